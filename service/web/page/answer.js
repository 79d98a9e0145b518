/** The answer as bars: labels by probability, each a button that asks where the model saw it. */

import { compareButton } from "./comparison.js";
import { byId, make } from "./dom.js";
import { labelBox } from "./labelbox.js";
import { figure, percent } from "./numbers.js";
import { shareButton } from "./share.js";
import { timing } from "./timing.js";

const place = byId("answer");
const ask = byId("ask");
/** The contract whose labels can be asked about. */
let offered = null;

/**
 * Show a photo's answer.
 * @param {import("./gallery.js").Photo} photo
 * @param {import("./api.js").Model} model
 * @param {{temperature: number, task: string, known?: {threshold: number} | null} | null} contract null until it is known
 * @param {string | null} explained the label whose heat map is shown
 * @param {{choose: (label: string) => void, again: () => void}} acts
 */
export function showAnswer(photo, model, contract, explained, acts) {
  const hadFocus = place.contains(document.activeElement);
  const focused = document.activeElement;
  const label = focused?.closest("#answer li")?.getAttribute("data-label");
  const held = label ? `[data-label="${CSS.escape(label)}"] button` : `button[class="${focused?.className}"]`;
  if (photo.error) place.replaceChildren(refused(photo, acts.again));
  else if (!photo.answer) place.replaceChildren(waiting(photo.upload));
  else place.replaceChildren(...answered(photo, model, contract, explained, acts.choose));
  offerLabels(photo.answer, contract, acts.choose);
  if (hadFocus) (place.querySelector(held) ?? place).focus(); // it was made anew
}

/** Any label can be asked about where the answer does not have all. */
function offerLabels(answer, contract, choose) {
  ask.hidden = !answer || !contract || answer.predictions.length >= contract.labels.length;
  if (ask.hidden || offered === contract) return;
  offered = contract;
  ask.replaceChildren(labelBox("Why not …?", contract.labels, choose));
}

/** How much of the photo has been sent, and a way to stop it. @param {import("./upload.js").Upload} upload */
function waiting(upload) {
  const words = make("p", { class: "soft" });
  const bar = make("progress", { "aria-label": upload.file ? "Sent of the photo" : "Fetching the photo" });
  const cancel = make("button", { type: "button", on: { click: () => upload.cancel() } }, "Cancel");
  const element = make("div", { class: "refusal" });
  let isSending = null;
  const update = () => {
    const way = upload.file ? `Sending the photo: ${Math.floor(100 * upload.progress)}% …` : "Fetching the photo …";
    words.textContent = upload.isSending ? way : "Asking …";
    if (upload.file) bar.value = upload.progress;
    if (upload.isSending === isSending) return;
    ({ isSending } = upload);
    const hadFocus = element.contains(document.activeElement);
    element.replaceChildren(words, ...(isSending ? [bar, cancel] : []));
    if (hadFocus) place.focus();
  };
  upload.addEventListener("progress", update);
  update();
  return element;
}

function refused({ name, error }, again) {
  return make(
    "div",
    { class: "refusal" },
    make("p", { class: "fault" }, make("strong", {}, name), `: ${error.message}`),
    !error.lasting && make("button", { type: "button", on: { click: again } }, "Ask again"),
  );
}

function answered({ answer, asked }, model, contract, explained, choose) {
  const [best] = answer.predictions;
  const isOther = asked?.label === explained && answer.predictions.every(({ label }) => label !== explained);
  return [
    make(
      "p",
      { class: "verdict", data: { label: best.label, value: best.probability } },
      make("span", { class: "word" }, best.label),
      make("span", { class: "sure", title: exactly(best) }, percent(best.probability)),
    ),
    answer.known === false && unlike(answer, contract),
    make("ol", { class: "bars" }, ...[...answer.predictions, ...(isOther ? [asked] : [])].map((one) => bar(one, explained, choose))),
    make("p", { class: "soft" }, ...meta(model, contract)),
    make("div", { class: "ways" }, shareButton(), compareButton()),
    timing(answer),
  ].filter(Boolean);
}

/** That the model should not be believed. @param {{known_score: number}} answer */
function unlike({ known_score: score }, contract) {
  const limit = contract?.known ? `; of photos like its own it is ${figure(contract.known.threshold)} or more` : "";
  return make(
    "p",
    { class: "unlike", title: `The score is ${figure(score)}${limit}.` },
    make("strong", {}, "Unlike anything I was trained on."),
    " I can only name what I know: take this answer as a guess.",
  );
}

function bar(prediction, explained, choose) {
  const { label, probability, selected } = prediction;
  return make(
    "li",
    { data: { label, value: probability } },
    make(
      "button",
      {
        type: "button",
        title: `${exactly(prediction)}. Show what speaks for it`,
        "aria-pressed": String(label === explained),
        "aria-label": `${label}, ${exactly(prediction)}${selected ? ", selected" : ""}. Show what the model looked at for it`,
        on: { click: () => choose(label) },
      },
      make(
        "span",
        { class: "label" },
        label,
        selected ? make("span", { class: "chosen", title: "above its threshold" }, " ✓") : null,
      ),
      make(
        "span",
        { class: "track" },
        make("span", { class: "fill", style: { width: `${100 * probability}%` } }),
      ),
      make("span", { class: "share" }, percent(probability)),
    ),
  );
}

function exactly({ probability }) {
  return `probability ${probability.toPrecision(6)}`;
}

function meta(model, contract) {
  const name = make("span", { class: "model" }, `${model.name}, version ${model.version}`);
  if (!contract) return [name];
  const calibrated = contract.temperature !== 1;
  const note = calibrated
    ? `Calibrated on held-out images: the logits were divided by a temperature of ${contract.temperature.toPrecision(3)}.`
    : "As the network gives them: no temperature was fitted on held-out images.";
  return [
    name,
    " · ",
    make("span", { class: "calibrated", title: note }, calibrated ? "calibrated" : "not calibrated"),
    calibrated ? " for photos like those it was trained on" : "",
    make("span", { class: "unseen" }, ` ${note}`),
  ];
}
