/** Side by side: two labels, two photos, two models or versions of one. The left side is what is open on the page. */

import { byId, make } from "../dom.js";
import { featuresOf } from "../features.js";
import { labelBox } from "../labelbox.js";
import { descriptionOf } from "../layers.js";
import { Side } from "./side.js";

/** @typedef {import("../gallery.js").Photo} Photo */
/** @typedef {import("../api.js").Model} Model */
/**
 * @typedef {object} Shown the page as it is
 * @property {Photo[]} photos
 * @property {{name: string, model: Model}[]} models with the names that the page gives them
 * @property {Model} model
 * @property {Photo | null} photo
 * @property {string | null} label
 * @property {(finding: import("../address.js").Finding, photo: Photo) => void} goTo
 */

const panel = byId("compare");
const photoPicker = make("select", { "aria-label": "Photo" });
const modelPicker = make("select", { "aria-label": "Model" });
const labelPlace = make("div", { class: "labels" });
const controls = make(
  "div",
  { class: "controls" },
  make("label", { class: "picker" }, make("span", {}, "Photo"), " ", photoPicker),
  make("label", { class: "picker" }, make("span", {}, "Model"), " ", modelPicker),
  labelPlace,
);
const goTo = (finding, photo) => now.goTo(finding, photo);
const left = new Side("What is open", goTo, make("p", { class: "soft controls" }, "What is open on this page"));
const right = new Side("Compared with", goTo, controls);
const decision = make("div", { class: "decision" });

/** @type {Shown} */
let now;
/** What the right side shows; null: as the page. @type {{photo: Photo | null, model: Model | null, label: string | null}} */
let chosen = { photo: null, model: null, label: null };
/** The model whose labels the box has. @type {Model | null} */
let offered = null;
/** What both sides have found out. */
let [leftLooked, rightLooked] = [null, null];

panel.append(
  make(
    "div",
    { class: "heading" },
    make("h2", { id: "compare-title", tabIndex: -1 }, "Side by side"),
    make("button", { type: "button", on: { click: close } }, "Close"),
  ),
  make("div", { class: "sides" }, left.element, right.element),
  decision,
);
photoPicker.addEventListener("change", () => choose({ photo: now.photos[photoPicker.selectedIndex] }));
modelPicker.addEventListener("change", () => choose({ model: now.models[modelPicker.selectedIndex].model, label: null }));

/** Keep both sides as the page is. @param {Shown} page */
export function showComparison(page) {
  now = page;
  if (!now.photo?.answer) return;
  if (chosen.photo && !now.photos.includes(chosen.photo)) chosen.photo = null;
  if (chosen.model && !now.models.some(({ model }) => model === chosen.model)) chosen.model = null;
  show();
}

function close() {
  panel.hidden = true;
  for (const side of [left, right]) side.close();
  document.querySelector(".compare-open")?.focus();
}

function choose(change) {
  chosen = { ...chosen, ...change };
  show();
}

function show() {
  const { photo, model, label } = now;
  const other = { photo: chosen.photo ?? photo, model: chosen.model ?? model };
  const isSame = other.photo === photo && other.model === model;
  offer(photoPicker, now.photos.map(({ name }) => name), now.photos.indexOf(other.photo));
  offer(modelPicker, now.models.map(({ name }) => name), now.models.findIndex((one) => one.model === other.model));
  offerLabels(other.model);
  // Beside the same photo and model another label is of interest; beside others the same, if the model has it.
  const rival = isSame ? photo.answer.predictions.find((one) => one.label !== label)?.label : sharedLabel(other.model);
  const looking = [left.show({ photo, model, label }), right.show({ ...other, label: chosen.label ?? rival ?? null })];
  if (looking[0] || looking[1]) settle(...looking);
}

/** The label that is open, where the other model is known to have it. */
function sharedLabel(model) {
  return model === now.model || labelsOf.get(model)?.includes(now.label) ? now.label : null;
}

/** @type {Map<Model, string[]>} */
const labelsOf = new Map();

async function offerLabels(model) {
  if (offered === model) return;
  offered = model;
  const { labels } = await descriptionOf(model).catch(() => ({ labels: [] }));
  labelsOf.set(model, labels);
  if (offered === model) labelPlace.replaceChildren(labelBox("Why not …?", labels, (label) => choose({ label })));
}

/** @param {HTMLSelectElement} picker @param {string[]} names @param {number} at */
function offer(picker, names, at) {
  if (names.join("\n") !== Array.from(picker.options, ({ text }) => text).join("\n"))
    picker.replaceChildren(...names.map((name) => make("option", {}, name)));
  picker.selectedIndex = at;
}

/** Say what decides between the sides, once both are known. A side that has not changed keeps what it found. */
async function settle(lefts, rights) {
  decision.replaceChildren();
  const [one, other] = await Promise.all([lefts ?? leftLooked, rights ?? rightLooked]);
  [leftLooked, rightLooked] = [one, other];
  const areAlike = one && other && one.photo === other.photo && one.model === other.model && one.label !== other.label;
  decision.hidden = !areAlike;
  if (!areAlike) return;
  const pairs = [
    [left, one, other],
    [right, other, one],
  ];
  const found = await Promise.all(
    pairs.map(([side, looked, rival]) => featuresOf(looked, side.actsFor(looked), looked.label, rival.label)),
  ).catch(() => []);
  if (leftLooked !== one || rightLooked !== other) return;
  const known = found.filter(Boolean);
  decision.replaceChildren(
    ...(known.length ? [make("h3", {}, "What decides between them")] : []),
    make("div", { class: "sides" }, ...known.map((nodes) => make("div", { class: "found" }, ...nodes))),
  );
}
