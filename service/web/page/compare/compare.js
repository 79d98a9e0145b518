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
/** What both sides find out. @type {Promise<import("./side.js").Looked | null>[]} */
let looking = [Promise.resolve(null), Promise.resolve(null)];

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

async function show() {
  const { photo, model, label } = now;
  const other = { photo: chosen.photo ?? photo, model: chosen.model ?? model };
  const isSame = other.photo === photo && other.model === model;
  offer(photoPicker, now.photos.map(({ name }) => name), now.photos.indexOf(other.photo));
  offer(modelPicker, now.models.map(({ name }) => name), now.models.findIndex((one) => one.model === other.model));
  const labels = await labelsOf(other.model);
  if (panel.hidden || now.photo !== photo || now.model !== model || now.label !== label) return; // it was called again
  if (other.photo !== (chosen.photo ?? photo) || other.model !== (chosen.model ?? model)) return;
  offerLabels(other.model, labels);
  // Beside the same photo and model another label is of interest; beside others the same, if the model has it.
  const second = photo.answer?.predictions.find((one) => one.label !== label)?.label;
  const rival = isSame ? second : labels.find((one) => one === label);
  const isApt = labels.includes(chosen.label) && !(isSame && chosen.label === label);
  const compared = isApt ? chosen.label : (rival ?? null);
  const asked = [left.show({ photo, model, label }), right.show({ ...other, label: compared })];
  if (!asked[0] && !asked[1]) return;
  looking = looking.map((before, at) => asked[at] ?? before); // a side that has not changed keeps what it finds out
  settle(looking);
}

/** @param {Model} model @returns {Promise<string[]>} none where the network cannot be read */
function labelsOf(model) {
  return descriptionOf(model).then(
    ({ labels }) => labels,
    () => [],
  );
}

function offerLabels(model, labels) {
  if (offered === model) return;
  offered = model;
  labelPlace.replaceChildren(labelBox("Why not …?", labels, (label) => choose({ label })));
}

/** @param {HTMLSelectElement} picker @param {string[]} names @param {number} at */
function offer(picker, names, at) {
  if (names.join("\n") !== Array.from(picker.options, ({ text }) => text).join("\n"))
    picker.replaceChildren(...names.map((name) => make("option", {}, name)));
  picker.selectedIndex = at;
}

/** Say what decides between the sides, once both are known. @param {typeof looking} mine */
async function settle(mine) {
  decision.replaceChildren();
  const [one, other] = await Promise.all(mine);
  if (looking !== mine) return;
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
  if (looking !== mine) return;
  const known = found.filter(Boolean);
  decision.replaceChildren(
    ...(known.length ? [make("h3", {}, "What decides between them")] : []),
    make("div", { class: "sides" }, ...known.map((nodes) => make("div", { class: "found" }, ...nodes))),
  );
}
