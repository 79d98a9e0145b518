/** The network from left to right: a column for each layer or folded block, with its maps as small multiples. */

import { BOTTOM, FOLDED_BEYOND, LABELS_SHOWN, SIDE, arrange, blocks, capacity, middle } from "./columns.js";
import { css, colourOf, inkOn, legend, scaleFor } from "./colours.js";
import { make, setStyles } from "./dom.js";
import { Edges } from "./edges.js";
import { lesson } from "./learn.js";
import { counted, figure, whole } from "./numbers.js";
import { paint } from "./paint.js";

/** @typedef {import("./columns.js").Column} Column */
/** @typedef {import("./api.js").Layer} Layer */

/** Height of a column, CSS pixels: below its maps are the pager and the legend. */
const HEIGHT = BOTTOM + 62;
/** How near a column must come before its maps are asked for, CSS pixels. */
const NEAR = "500px";

export class Network {
  /**
   * @param {HTMLElement} place scrolls sideways
   * @param {import("./api.js").Description} description
   * @param {import("./tensors.js").Tensors} tensors
   * @param {object} acts
   * @param {(layer: Layer, index: number) => void} acts.open a map or a value was chosen
   * @param {(layer: Layer | null, row?: number, column?: number) => void} acts.point the layer that is pointed at,
   *   and the pixel of its map
   */
  constructor(place, description, tensors, acts) {
    this.#place = place;
    this.#description = description;
    this.#tensors = tensors;
    this.#acts = acts;
    const all = blocks(description.layers);
    this.blocks = all;
    this.#unfolded = description.layers.length > FOLDED_BEYOND ? new Set() : new Set(all);
    this.#observer = new IntersectionObserver((seen) => seen.forEach((one) => this.#inView(one)), {
      rootMargin: NEAR,
      scrollMargin: NEAR,
    });
    this.#listen();
    this.#build();
  }

  #place;
  #description;
  #tensors;
  #acts;
  #unfolded;
  #observer;
  /** @type {number[] | null} labels as their columns show them; null until that is needed */
  #order = null;
  #edges = new Edges();
  /** @type {Column[]} */
  #columns = [];
  /** @type {Map<Column, HTMLElement>} */
  #elements = new Map();
  #listening = new AbortController();

  /** Take it off the page. */
  close() {
    this.#observer.disconnect();
    this.#listening.abort();
    this.#place.replaceChildren();
  }

  /** Fold all blocks, or unfold them. */
  foldAll(fold) {
    this.#unfolded = fold ? new Set() : new Set(this.blocks);
    this.#build();
  }

  /** Mark the map that is open. @param {Layer | null} layer @param {number} [index] */
  mark(layer, index) {
    this.#opened = layer && { tensor: layer.tensor, index };
    for (const button of this.#place.querySelectorAll(".map[aria-current]")) button.removeAttribute("aria-current");
    if (layer) this.#buttonOf(layer.tensor, index)?.setAttribute("aria-current", "true");
  }

  /** Put the focus on a map. */
  focus(layer, index) {
    this.#buttonOf(layer.tensor, index)?.focus();
  }

  #opened = null;

  #buttonOf(tensor, index) {
    return this.#place.querySelector(`.map[data-tensor="${CSS.escape(tensor)}"][data-index="${index}"]`);
  }

  // --- the columns ---

  #build() {
    this.#observer.disconnect();
    const { layers, labels } = this.#description;
    this.#columns = arrange(layers, this.#unfolded, labels.length);
    this.#elements = new Map(this.#columns.map((column) => [column, this.#column(column)]));
    const last = this.#columns[this.#columns.length - 1];
    const width = last.left + last.width + 14;
    const canvas = make("div", { class: "canvas" }, this.#edges.element, ...this.#brackets(), ...this.#elements.values());
    setStyles(canvas, { width: `${width}px`, height: `${HEIGHT}px` });
    this.#place.replaceChildren(canvas);
    this.#edges.draw(this.#columns, width, HEIGHT);
    for (const element of this.#elements.values()) this.#observer.observe(element);
  }

  /** @param {Column} column */
  #column(column) {
    const { layer, layers, left, width } = column;
    const folded = layers.length > 1;
    const element = make(
      "div",
      { class: folded ? "column folded" : "column", role: "group", "aria-label": titleOf(column), data: { tensor: layer.tensor, kind: layer.kind } },
      make(
        "div",
        { class: "title" },
        make("strong", {}, folded ? counted(layers.length, "layer") : lesson(layer).name),
        make("span", { title: layer.name }, folded ? "last: " + lesson(layer).name : shortened(layer.name)),
        make("span", {}, shapeOf(layer)),
      ),
      make("div", { class: "maps" }),
      make("div", { class: "foot" }),
    );
    setStyles(element, { left: `${left}px`, width: `${width}px`, height: `${HEIGHT}px` });
    return element;
  }

  /** A bracket over each block, with a button that folds or unfolds it. */
  #brackets() {
    const found = new Map();
    for (const column of this.#columns) {
      if (column.block && this.blocks.has(column.block)) found.set(column.block, [...(found.get(column.block) ?? []), column]);
    }
    return [...found].map(([block, columns]) => {
      const folded = !this.#unfolded.has(block);
      const last = columns[columns.length - 1];
      const button = make(
        "button",
        {
          type: "button",
          class: folded ? "bracket folded" : "bracket",
          "aria-expanded": String(!folded),
          title: `${folded ? "Unfold" : "Fold"} ${block}`,
          "aria-label": `Block ${block}`,
          on: { click: () => this.#toggle(block) },
        },
        make("span", { class: "sign", "aria-hidden": "true" }, folded ? "+" : "−"),
        make("span", { class: "name" }, shortened(block)),
      );
      setStyles(button, { left: `${columns[0].left}px`, width: `${last.left + last.width - columns[0].left}px` });
      return button;
    });
  }

  #toggle(block) {
    if (!this.#unfolded.delete(block)) this.#unfolded.add(block);
    this.#build();
    this.#place.querySelector(`.bracket[aria-label="${CSS.escape(`Block ${block}`)}"]`)?.focus();
    this.mark(this.#opened && this.#description.layers.find(({ tensor }) => tensor === this.#opened.tensor), this.#opened?.index);
  }

  #inView({ target, isIntersecting }) {
    const column = this.#columns.find((one) => this.#elements.get(one) === target);
    if (!column) return;
    if (isIntersecting) this.#fill(column);
    else if (!target.contains(document.activeElement)) this.#empty(column);
  }

  #empty(column) {
    const element = this.#elements.get(column);
    element.querySelector(".maps").replaceChildren();
    element.querySelector(".foot").replaceChildren();
  }

  /** Show a column's maps; they are asked for unless they are known. */
  async #fill(column) {
    const place = this.#elements.get(column).querySelector(".maps");
    if (place.childElementCount) return;
    if (column.content === "nothing") {
      place.append(make("p", { class: "soft nothing" }, "no maps"));
      return;
    }
    if (column.content === "labels" && !this.#order) this.#order = await this.#labelOrder();
    if (place.childElementCount) return; // it was filled while the order was waited for
    const indices = this.#indices(column);
    const buttons = indices.map((index, row) => this.#button(column, index, row));
    place.replaceChildren(...buttons);
    this.#foot(column, null);
    this.#keepOneTabStop();
    try {
      await this.#show(column, indices, buttons);
    } catch (error) {
      if (error.name !== "AbortError") place.replaceChildren(make("p", { class: "soft nothing" }, error.message));
    }
  }

  /** Which maps, values or labels a column shows now. */
  #indices(column) {
    const count = Math.min(capacity(column), column.layer.shape[0] - column.first);
    const inOrder = Array.from({ length: count }, (_, row) => column.first + row);
    const ordered = column.content === "labels" && column.layer.shape[0] === this.#order.length;
    return ordered ? inOrder.map((at) => this.#order[at]) : inOrder;
  }

  /** Labels in their own order where all are shown, else the most probable first. */
  async #labelOrder() {
    const { layers, labels } = this.#description;
    const inOrder = labels.map((_, index) => index);
    if (labels.length <= LABELS_SHOWN) return inOrder;
    try {
      const { values } = await this.#tensors.maps(layers[layers.length - 1].tensor);
      return inOrder.sort((one, other) => values[other] - values[one]);
    } catch {
      return inOrder;
    }
  }

  #button(column, index, row) {
    const { layer } = column;
    const what = column.content === "maps" ? "map" : column.content === "labels" ? this.#label(layer, index) : "value";
    const button = make(
      "button",
      {
        type: "button",
        class: `map ${column.content}`,
        tabIndex: -1,
        data: { tensor: layer.tensor, index, row },
        "aria-label": column.content === "labels" ? `${what}, ${lesson(layer).name}` : `${what} ${index + 1} of ${layer.shape[0]}, ${lesson(layer).name} ${layer.name}`,
        on: { click: () => this.#acts.open(layer, index) },
      },
      column.content === "maps" ? make("canvas", {}) : null,
    );
    if (this.#opened?.tensor === layer.tensor && this.#opened.index === index) button.setAttribute("aria-current", "true");
    setStyles(button, { top: `${middle(column, row)}px` });
    return button;
  }

  #label({ shape }, index) {
    const { labels } = this.#description;
    return labels.length === 2 && shape[0] === 1 ? labels[1] : labels[index];
  }

  async #show(column, indices, buttons) {
    const { layer, content } = column;
    const whole = content === "labels";
    const array = await this.#tensors.maps(layer.tensor, whole ? 0 : column.first, whole ? 0 : indices.length);
    const scale = scaleFor(array.lowest, array.highest);
    const [, height, width] = layer.shape;
    buttons.forEach((button, row) => {
      if (content === "maps") {
        const size = height * width;
        paint(button.firstChild, array.values.subarray(row * size, (row + 1) * size), height, width, scale);
        setStyles(button, { "--ratio": width / height });
        button.firstChild.classList.toggle("pixels", width <= 2 * SIDE);
      } else {
        this.#showValue(button, column, indices[row], array.values[whole ? indices[row] : row], scale);
      }
    });
    this.#foot(column, scale);
  }

  #showValue(button, column, index, value, scale) {
    const colour = colourOf(scale, value);
    const number = make("span", { class: "swatch", data: { value } }, figure(value, 3));
    setStyles(number, { background: css(colour), color: inkOn(colour) });
    button.replaceChildren(...(column.content === "labels" ? [make("span", { class: "word" }, this.#label(column.layer, index))] : []), number);
  }

  /** What is below the maps: a pager where there are more, and the legend of the layer's colours. */
  #foot(column, scale) {
    const foot = this.#elements.get(column).querySelector(".foot");
    const more = column.layer.shape[0] - capacity(column);
    foot.replaceChildren(more > 0 ? this.#pager(column) : make("span", { class: "pager" }), scale ? legend(scale, ends(scale)) : make("span", { class: "scale" }));
  }

  #pager(column) {
    const [count, shown] = [column.layer.shape[0], capacity(column)];
    const page = (sign, step, name) =>
      make(
        "button",
        {
          type: "button",
          "aria-label": `${name} of ${lesson(column.layer).name} ${column.layer.name}`,
          disabled: column.first + step < 0 || column.first + step >= count,
          data: { step },
          on: { click: () => this.#turn(column, step) },
        },
        sign,
      );
    const more = column.first ? `${column.first + 1}–${Math.min(count, column.first + shown)}` : `${whole(count - shown)} more`;
    return make("span", { class: "pager" }, page("‹", -shown, "maps before"), make("span", {}, more), page("›", shown, "more maps"));
  }

  async #turn(column, step) {
    column.first += step;
    this.#empty(column);
    this.#redraw();
    await this.#fill(column);
    const pager = this.#elements.get(column).querySelector(".pager");
    (pager.querySelector(`button[data-step="${step}"]:enabled`) ?? pager.querySelector("button:enabled"))?.focus();
  }

  #redraw() {
    const last = this.#columns[this.#columns.length - 1];
    this.#edges.draw(this.#columns, last.left + last.width + 14, HEIGHT);
  }

  // --- pointing and keys ---

  #listen() {
    const { signal } = this.#listening;
    const on = (event, heard) => this.#place.addEventListener(event, heard, { signal });
    on("pointermove", (event) => this.#point(event.target.closest(".map"), event));
    on("pointerleave", () => this.#point(null));
    on("focusin", (event) => event.target.matches(".map") && this.#point(event.target));
    on("focusout", () => this.#point(null));
    on("keydown", (event) => this.#key(event));
  }

  /** @param {HTMLElement | null} button @param {PointerEvent} [event] where on it */
  #point(button, event) {
    const column = button && this.#columns.find(({ layer }) => layer.tensor === button.dataset.tensor);
    if (!column) {
      this.#edges.highlight(null, 0);
      this.#acts.point(null);
      return;
    }
    this.#edges.highlight(column, Number(button.dataset.row));
    this.#acts.point(column.layer, ...pixelAt(button, event, column.layer));
  }

  /** Arrows go from map to map; Tab leaves the network. */
  #key(event) {
    const button = event.target.closest(".map");
    const moves = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };
    if (!button || !(event.key in moves)) return;
    event.preventDefault();
    const [across, down] = moves[event.key];
    const at = this.#columns.findIndex(({ layer }) => layer.tensor === button.dataset.tensor);
    this.#goTo(at + across, Number(button.dataset.row) + down, across);
  }

  async #goTo(at, row, across) {
    const column = this.#columns[at];
    if (!column) return;
    if (column.content === "nothing") {
      if (across) await this.#goTo(at + across, row, across);
      return;
    }
    const filled = this.#fill(column);
    const place = this.#elements.get(column).querySelector(".maps");
    if (!place.querySelector(".map")) await filled;
    const buttons = place.querySelectorAll(".map");
    const button = buttons[Math.max(0, Math.min(buttons.length - 1, row))];
    if (!button) return;
    this.#place.querySelector('.map[tabindex="0"]')?.setAttribute("tabindex", "-1");
    button.tabIndex = 0;
    button.focus();
    button.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  #keepOneTabStop() {
    if (!this.#place.querySelector('.map[tabindex="0"]')) this.#place.querySelector(".map")?.setAttribute("tabindex", "0");
  }
}

/** Row and column of the map's pixel under the pointer, or in its middle. @param {PointerEvent} [event] */
function pixelAt(button, event, { shape: [, height, width] }) {
  const canvas = button.querySelector("canvas");
  if (!canvas || !height) return [];
  const area = canvas.getBoundingClientRect();
  const share = (at, from, size) => Math.max(0, Math.min(0.999, (at - from) / size));
  const x = event ? share(event.clientX, area.left, area.width) : 0.5;
  const y = event ? share(event.clientY, area.top, area.height) : 0.5;
  return [Math.floor(y * height), Math.floor(x * width)];
}

function titleOf({ layer, layers, block }) {
  if (layers.length > 1) return `${block}, ${layers.length} layers folded`;
  return `${lesson(layer).name} ${layer.name}, ${shapeOf(layer)}`;
}

/** @param {Layer} layer */
export function shapeOf({ shape }) {
  return shape.map((size) => size ?? "?").join(" × ");
}

/** The end of a long dotted name. */
function shortened(name) {
  const parts = name.split(".");
  return name.length > 15 && parts.length > 2 ? `…${parts.slice(-2).join(".")}` : name;
}

function ends({ lowest, highest }) {
  return /** @type {[string, string]} */ ([figure(lowest, 2), figure(highest, 2)]);
}
