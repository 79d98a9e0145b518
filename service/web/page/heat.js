/** Asks what the model looked at, and shows it as it becomes known. */

import { explain } from "./api.js";
import { byId } from "./dom.js";
import { counted } from "./numbers.js";
import { showSaw } from "./saw.js";
import { showHeat, showSeen } from "./stage.js";

const text = byId("heat-text");

/**
 * Show the heat map of one label. Raises nothing: what went wrong is said in the page.
 * @param {import("./api.js").Model} model
 * @param {import("./gallery.js").Photo} photo
 * @param {string | null} label null for the most probable
 * @param {AbortSignal} signal
 * @param {(saw: import("./api.js").Saw) => void} known called once the exact input is known
 */
export async function look(model, photo, label, signal, known) {
  text.textContent = "Looking …";
  let saw = null;
  try {
    for await (const told of explain(model, photo.file, label, signal)) {
      if (signal.aborted) return;
      if (told.heatmap) showHeat(told.heatmap);
      if (told.what_the_model_saw && !saw) {
        saw = told.what_the_model_saw;
        showSaw(saw);
        showSeen(saw);
        known(saw);
      }
      text.textContent = told.method ? conclusion(told) : `${Math.round(100 * told.progress)}% · ${counted(told.samples, "masked photo")} so far`;
    }
  } catch (error) {
    if (error.name === "AbortError") return;
    showHeat(null);
    text.textContent = `There is no heat map: ${error.message}`;
  }
}

function conclusion({ method, label, samples, note }) {
  const how =
    method === "cam"
      ? `Light where the last feature maps speak for “${label}”: an exact class activation map, the network's own sum.`
      : `Light where the probability of “${label}” fell when that part was covered: ${counted(samples, "masked photo")} were classified.`;
  return note ? `${how} (${note})` : how;
}
