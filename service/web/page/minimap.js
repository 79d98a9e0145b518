/** The whole network in one line: a bar for each layer, the part that is in view, and a jump to any layer. */

import { make, setStyles } from "./dom.js";
import { lesson } from "./learn.js";
import { ACTIVATIONS } from "./names.js";

/** @typedef {import("./api.js").Layer} Layer */

const LEARNED = new Set(["Conv", "ConvTranspose", "Gemm", "MatMul"]);
const STEPS = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1, PageUp: -10, PageDown: 10 };

export class Minimap {
  /** @param {Layer[]} layers @param {import("./network.js").Network} network */
  constructor(layers, network) {
    this.#layers = layers;
    this.#network = network;
    this.#view = make("span", { class: "part" });
    this.element = make(
      "div",
      {
        class: "bars-of-layers",
        role: "slider",
        tabIndex: 0,
        "aria-label": "All layers. Arrow keys go from layer to layer, Enter goes into one",
        "aria-valuemin": "1",
        "aria-valuemax": String(layers.length),
        on: {
          keydown: (event) => this.#key(event),
          pointerdown: (event) => this.#drag(event),
          pointermove: (event) => event.buttons === 1 && this.#drag(event),
        },
      },
      ...layers.map(bar),
      this.#view,
    );
    network.watch((first, last) => this.#showView(first, last));
  }

  #layers;
  #network;
  #view;
  /** Number of the layer that was jumped to. */
  #at = 1;

  /** @param {Layer} first @param {Layer} last that are in view */
  #showView(first, last) {
    const [from, to] = [this.#layers.indexOf(first), this.#layers.indexOf(last) + 1];
    const percent = (part) => `${(100 * part) / this.#layers.length}%`;
    setStyles(this.#view, { left: percent(from), width: percent(to - from) });
    Object.assign(this.#view.dataset, { first: from + 1, last: to });
    if (this.#at <= from || this.#at > to) this.#at = from + 1;
    this.#tell();
  }

  #tell() {
    const layer = this.#layers[this.#at - 1];
    this.element.setAttribute("aria-valuenow", String(this.#at));
    this.element.setAttribute("aria-valuetext", `Layer ${this.#at}: ${lesson(layer).name} ${layer.name}`);
  }

  #key(event) {
    const count = this.#layers.length;
    if (event.key === "Enter") this.#network.enter(this.#layers[this.#at - 1]);
    else if (event.key in STEPS) this.#jump(this.#at + STEPS[event.key]);
    else if (event.key === "Home" || event.key === "End") this.#jump(event.key === "Home" ? 1 : count);
    else return;
    event.preventDefault();
  }

  #drag(event) {
    this.element.setPointerCapture(event.pointerId);
    const { left, width } = this.element.getBoundingClientRect();
    this.#jump(Math.floor(((event.clientX - left) / width) * this.#layers.length) + 1);
  }

  #jump(number) {
    this.#at = Math.max(1, Math.min(this.#layers.length, number));
    this.#network.scrollTo(this.#layers[this.#at - 1]);
    this.#tell();
  }
}

/** Its height says how many maps a layer has, its colour what the layer does. @param {Layer} layer @param {number} at */
function bar(layer, at) {
  const { kind, shape, name } = layer;
  const element = make("i", { class: familyOf(kind), title: `${at + 1} ${lesson(layer).name} ${name}` });
  setStyles(element, { height: `${25 + 75 * Math.min(1, Math.log2(shape[0] || 1) / 11)}%` });
  return element;
}

function familyOf(kind) {
  if (LEARNED.has(kind)) return "learned";
  if (ACTIVATIONS.has(kind)) return "activation";
  return kind.includes("Pool") || kind.startsWith("Reduce") ? "pooling" : "other";
}
