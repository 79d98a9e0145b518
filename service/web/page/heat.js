/** Asks what the model looked at, and shows it as it becomes known. */

import { explain } from "./api.js";
import { byId, say } from "./dom.js";
import { counted } from "./numbers.js";
import { showSaw } from "./saw.js";
import { showHeat, showSeen } from "./stage.js";

const text = byId("heat-text");
const bar = /** @type {HTMLProgressElement} */ (byId("heat-progress"));

/**
 * Show the heat map of one label. Raises nothing: what went wrong is said in the page.
 * @param {import("./api.js").Model} model
 * @param {import("./gallery.js").Photo} photo
 * @param {string | null} label null for the most probable
 * @param {AbortSignal} signal
 * @param {(saw: import("./api.js").Saw | null) => void} known called once the exact input is known, or is not to be had
 * @param {(prediction: import("./api.js").Prediction) => void} concluded called with the label and its probability
 */
export async function look(model, photo, label, signal, known, concluded) {
  tell("Looking …");
  hideEmpty(false, false);
  let saw = null;
  try {
    for await (const told of explain(model, photo.upload, label, signal)) {
      if (signal.aborted) return;
      if (told.heatmap) showHeat(told.heatmap);
      if (told.what_the_model_saw && !saw) {
        saw = told.what_the_model_saw;
        showSaw(saw);
        showSeen(saw);
        known(saw);
      }
      if (!told.method) tell(`${counted(told.samples, "masked photo")} classified so far`, told.progress);
      else {
        conclude(told);
        concluded({ label: told.label, index: told.index, probability: told.probability });
      }
    }
  } catch (error) {
    if (error.name === "AbortError") return;
    showHeat(null);
    hideEmpty(true, !saw);
    if (!saw) showSaw(null, `It cannot be shown: ${error.message}`);
    known(null);
    tell(`There is no heat map: ${error.message}`);
  }
}

/** @param {number | null} [share] how far it is; null: no telling */
function tell(words, share = null) {
  text.textContent = words;
  bar.hidden = share === null;
  if (share !== null) bar.value = share;
}

/** Take away what only a heat map needs, and the place for the model's input. @param {boolean} heat @param {boolean} input */
function hideEmpty(heat, input) {
  byId("opened").classList.toggle("no-heat", heat);
  byId("opened").classList.toggle("no-input", input);
}

function conclude(told) {
  tell(conclusion(told));
  say(conclusion(told));
}

function conclusion({ method, label, samples, note }) {
  const how =
    method === "cam"
      ? `Light where the last feature maps speak for “${label}”: an exact class activation map, the network's own sum.`
      : `Light where “${label}” scores higher with that part seen than hidden: ${counted(samples, "masked photo")} were classified.`;
  return note ? `${how} An exact map is not to be had: ${note}.` : how;
}
