/** A tour of the page in six steps. It marks one part after another, and can be left at any time. */

import { make } from "../dom.js";
import { visit } from "../layers.js";
import { havePhoto } from "./loader.js";
import { SECTIONS } from "./words.js";

/**
 * @typedef {object} Step
 * @property {string} part what is marked, as a selector
 * @property {string} title
 * @property {string} text
 * @property {() => void} [prepare]
 */

/** @type {Step[]} */
const STEPS = [
  {
    part: "#intake",
    title: "Photos",
    text: "This is a sample, unless you have opened a photo of your own. Drop, paste or choose as many photos as you like. They go to this service and nowhere else.",
  },
  {
    part: "#opened .answer",
    title: "The answer",
    text: "The model gives each of its labels a probability. Choose a bar to ask what in the photo speaks for that label, also for one that lost.",
  },
  {
    part: "#opened .looked",
    title: "What it looked at",
    text: "Light places speak for the chosen label. The dashed frame is the part of the photo that the model was given; beside it you see its exact input.",
  },
  {
    part: "#network",
    title: "Every layer",
    text: "Each column is a layer, and each square is a map: what that layer makes of this photo. Point at a map to see what it is made of, and which part of the photo one pixel of it can see.",
  },
  {
    part: "#detail",
    title: "The arithmetic",
    text: "A click on a map shows how its numbers come about. Here you see a convolution: point at a pixel of the large map, and follow the products to their sum. Or press Play, and watch the map grow.",
    prepare: () => visit(SECTIONS.find(({ id }) => id === "convolution").layer, 0),
  },
  {
    part: "header .controls",
    title: "Go on from here",
    text: "Choose another model and compare. “Learn” explains each kind of layer, with pictures by the model that you have chosen, and lets you play with a sliding window.",
  },
];

/** @type {(() => void) | null} ends the tour that is on */
let end = null;

/** Begin the tour. @param {() => void} finished called when it is over, or was left */
export async function startTour(finished) {
  end?.();
  await havePhoto();
  const leaving = new AbortController();
  const card = make("div", { class: "tour card", role: "dialog", "aria-labelledby": "tour-title" });
  document.body.append(card);
  end = () => {
    leaving.abort();
    card.remove();
    mark(null);
    end = null;
    finished();
  };
  card.addEventListener("keydown", (event) => event.key === "Escape" && end?.());
  showStep(card, 0, leaving.signal);
}

/** @param {HTMLElement} card @param {number} at @param {AbortSignal} left */
async function showStep(card, at, left) {
  const { part, title, text, prepare } = STEPS[at];
  const go = (step) => () => showStep(card, at + step, left);
  const button = (words, act, options = {}) =>
    make("button", { type: "button", on: { click: act }, ...options }, words);
  const isLast = at === STEPS.length - 1;
  card.replaceChildren(
    make(
      "h2",
      { id: "tour-title", tabIndex: -1 },
      title,
      make("span", { class: "soft" }, ` ${at + 1} of ${STEPS.length}`),
    ),
    make("p", {}, text),
    make(
      "div",
      { class: "ways" },
      button("Back", go(-1), { disabled: at === 0 }),
      isLast ? button("Finish", () => end?.(), { class: "main" }) : button("Next", go(1), { class: "main" }),
      isLast ? null : button("Skip the tour", () => end?.()),
    ),
  );
  card.dataset.step = String(at + 1);
  prepare?.();
  const element = document.querySelector(part);
  await shown(element, left);
  if (left.aborted || card.dataset.step !== String(at + 1)) return;
  mark(element);
  card.querySelector("h2").focus({ preventScroll: true });
}

/** Mark one part of the page, and no other. @param {Element | null} part */
function mark(part) {
  document.querySelector(".toured")?.classList.remove("toured");
  part?.classList.add("toured");
  part?.scrollIntoView({ block: "start" });
}

/** Wait until an element and all around it are shown. @param {Element} element @param {AbortSignal} left */
function shown(element, left) {
  return new Promise((resolve) => {
    const isShown = () => !element.closest("[hidden]") || left.aborted;
    if (isShown()) return resolve(undefined);
    const observer = new MutationObserver(() => {
      if (!isShown()) return;
      observer.disconnect();
      resolve(undefined);
    });
    observer.observe(document.body, { subtree: true, attributeFilter: ["hidden"] });
    left.addEventListener("abort", () => {
      observer.disconnect();
      resolve(undefined);
    });
    return undefined;
  });
}
