/** One side of a comparison: a label of a photo by a model, with its heat map and its features. */

import * as api from "../api.js";
import { HEAT } from "../colours.js";
import { make } from "../dom.js";
import { featuresOf } from "../features.js";
import { PhotoFrame } from "../frame.js";
import { descriptionOf } from "../layers.js";
import { percent } from "../numbers.js";
import { paint } from "../paint.js";
import { Tensors } from "../tensors.js";

/** Labels that are asked for, as for the page itself. */
const TOP = 10;
/** Labels that are shown. */
const SHOWN = 3;

/** @typedef {{model: api.Model, photo: import("../gallery.js").Photo, label: string | null}} Case label null: the most probable */
/** @typedef {import("../features.js").Subject & {model: api.Model, label: string}} Looked */

export class Side {
  /**
   * @param {string} name
   * @param {(finding: import("../address.js").Finding, photo: import("../gallery.js").Photo) => void} goTo
   * @param {...Node} controls
   */
  constructor(name, goTo, ...controls) {
    this.#goTo = goTo;
    this.#frame.substitute.after(this.#heat);
    this.#title = make("h3", {}, "");
    this.element = make(
      "section",
      { class: "side", "aria-label": name },
      ...controls,
      this.#title,
      make("div", { class: "stage" }, this.#frame.element),
      this.#text,
      this.#answer,
      this.#features,
    );
  }

  #goTo;
  #frame = new PhotoFrame();
  #heat = make("canvas", { class: "heat", "aria-hidden": "true", hidden: true });
  #title;
  #text = make("p", { class: "soft", role: "status" });
  #answer = make("p", { class: "soft" });
  #features = make("div", { class: "found" });
  #calledOff = new AbortController();
  /** @type {Case | null} */
  #shown = null;

  /** Take away what is shown, and stop asking. */
  close() {
    this.#calledOff.abort();
    this.#shown = null;
  }

  /**
   * Show a case, unless it is shown already.
   * @param {Case} wanted
   * @returns {Promise<Looked | null> | null} what was found out; null in the promise where it was called off or failed; null if it is shown already
   */
  show(wanted) {
    const { model, photo, label } = wanted;
    if (this.#shown?.model === model && this.#shown.photo === photo && this.#shown.label === label) return null;
    this.close();
    this.#shown = wanted;
    this.#calledOff = new AbortController();
    this.element.setAttribute("aria-busy", "true");
    return this.#look(wanted, this.#calledOff.signal);
  }

  async #look({ model, photo, label }, signal) {
    this.#title.textContent = label ?? "…";
    this.#text.textContent = "Looking …";
    this.#answer.textContent = "";
    this.#features.replaceChildren();
    this.#heat.hidden = true;
    this.#frame.show(photo);
    try {
      const told = await this.#explain(model, photo, label, signal);
      const description = await descriptionOf(model);
      const picture = Promise.resolve({ body: photo.upload, prepared: false });
      const tensors = new Tensors(model, picture, signal);
      const looked = { model, photo, label: told.label, description, tensors, saw: told.what_the_model_saw };
      const found = description.reason ? null : await featuresOf(looked, this.actsFor(looked), told.label);
      if (signal.aborted) return null;
      this.#features.replaceChildren(...(found ?? []));
      this.element.setAttribute("aria-busy", "false");
      return description.reason ? null : looked;
    } catch (error) {
      if (signal.aborted || error.name === "AbortError") return null;
      this.#text.textContent = `This cannot be shown: ${error.message}`;
      this.element.setAttribute("aria-busy", "false");
      return null;
    }
  }

  /** Show the heat map as it becomes known; returns the last and whole reply. */
  async #explain(model, photo, label, signal) {
    let last = null;
    for await (const told of api.explain(model, photo.upload, label, signal, TOP)) {
      signal.throwIfAborted();
      last = told;
      if (told.heatmap) {
        this.#heat.hidden = false;
        paint(this.#heat, told.heatmap.values.flat(), told.heatmap.height, told.heatmap.width, HEAT);
      }
      if (told.what_the_model_saw) this.#frame.showSeen(told.what_the_model_saw);
    }
    this.#title.textContent = `${last.label} ${percent(last.probability)}`;
    this.#title.dataset.label = last.label;
    this.#title.dataset.value = String(last.probability);
    this.#text.textContent = `${model.name}, version ${model.version}, on ${photo.name}`;
    const best = last.predictions.slice(0, SHOWN).map((one) => `${one.label} ${percent(one.probability)}`);
    this.#answer.textContent = `Its answer: ${best.join(", ")}`;
    return last;
  }

  /** A feature leads to its map, in the network that this side is about. @param {Looked} looked @returns {import("../features.js").Acts} */
  actsFor({ model, photo, label }) {
    const visit = (layer, index) =>
      this.#goTo(
        { model: model.name, version: model.version, label, layer: layer.tensor, map: index + 1 },
        photo,
      );
    return { visit, point: () => {} };
  }
}
