/** The network from left to right: a column for each layer or folded block, with its maps as small multiples. */

import {
  BOTTOM,
  FOLDED_BEYOND,
  LABELS_SHOWN,
  SIDE,
  areCompact,
  arrange,
  blocks,
  capacity,
  reach,
} from "./columns.js";
import { bracket, columnElement, foot, mapButton, showValue } from "./columnview.js";
import { make, setStyles } from "./dom.js";
import { Edges } from "./edges.js";
import { paint } from "./paint.js";
import { LayerScales } from "./scales.js";

/** @typedef {import("./columns.js").Column} Column */
/** @typedef {import("./api.js").Layer} Layer */

/** Height of a column, CSS pixels: below its maps are the pager and the legend. */
const HEIGHT = BOTTOM + 62;
/** How near a column must come before its maps are asked for, CSS pixels. */
const NEAR = "500px";
/** The map that Tab comes to. */
const TAB_STOP = '.map[tabindex="0"]';

/** @typedef {"pale" | "always" | "never"} Stretch which maps have the whole range of colours, each by itself */

export class Network {
  /**
   * @param {HTMLElement} place scrolls sideways
   * @param {import("./api.js").Description} description
   * @param {import("./tensors.js").Tensors} tensors
   * @param {object} acts
   * @param {(layer: Layer, index: number) => void} acts.open a map or a value was chosen
   * @param {(layer: Layer | null, row?: number, column?: number, value?: number) => void} acts.point the layer that
   *   is pointed at, the pixel of its map, and what that is
   * @param {Stretch} stretch
   */
  constructor(place, description, tensors, acts, stretch) {
    this.#stretch = stretch;
    this.#scales = new LayerScales(description, tensors, (tensor) =>
      this.#columns.some(({ layer }) => layer.tensor === tensor),
    );
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
  /** @type {Stretch} */
  #stretch;
  #scales;
  /** @type {WeakMap<HTMLElement, Float32Array>} what the maps show */
  #values = new WeakMap();

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

  /** Give each map the whole range of colours, or one scale to all of a layer. @param {Stretch} which */
  stretch(which) {
    this.#stretch = which;
    for (const column of this.#columns) {
      if (!this.#elements.get(column).querySelector(".map")) continue;
      this.#empty(column);
      this.#fill(column);
    }
  }

  /** Mark the map that is open, and bring it on show. @param {Layer | null} layer @param {number} [index] */
  async mark(layer, index) {
    this.#opened = layer && { layer, index };
    for (const one of this.#place.querySelectorAll(".map[aria-current]")) one.removeAttribute("aria-current");
    if (!layer) return;
    await this.#reveal(layer, index);
    this.#buttonOf(layer, index)?.setAttribute("aria-current", "true");
  }

  /** Put the focus on a map. */
  focus(layer, index) {
    this.#buttonOf(layer, index)?.focus();
  }

  /** Scroll sideways to a layer's column, or to that of its folded block. */
  scrollTo(layer) {
    const column = this.#columns.find(({ layers }) => layers.includes(layer));
    if (column) this.#place.scrollTo({ left: column.left + column.width / 2 - this.#place.clientWidth / 2 });
  }

  /** @type {{layer: Layer, index: number} | null} */
  #opened = null;

  #buttonOf({ tensor }, index) {
    return this.#place.querySelector(`.map[data-tensor="${CSS.escape(tensor)}"][data-index="${index}"]`);
  }

  /** Turn to the page of a map. */
  async #reveal(layer, index) {
    const column = this.#columns.find((one) => one.layer === layer);
    if (!column || this.#buttonOf(layer, index)) return;
    const at = this.#isOrdered(column) ? this.#order.indexOf(index) : index;
    await this.#turn(column, at - (at % capacity(column)));
  }

  // --- the columns ---

  #build() {
    this.#observer.disconnect();
    const { layers, labels } = this.#description;
    this.#columns = arrange(layers, this.#unfolded, labels.length, this.#place.clientWidth);
    this.#elements = new Map(this.#columns.map((column) => [column, columnElement(column, HEIGHT)]));
    const width = reach(this.#columns);
    const canvas = make(
      "div",
      { class: areCompact(this.#columns) ? "canvas compact" : "canvas" },
      this.#edges.element,
      ...this.#brackets(),
      ...this.#elements.values(),
    );
    setStyles(canvas, { width: `${width}px`, height: `${HEIGHT}px` });
    this.#place.replaceChildren(canvas);
    this.#edges.draw(this.#columns, width, HEIGHT);
    for (const element of this.#elements.values()) this.#observer.observe(element);
  }

  /** One for each block that has several layers. */
  #brackets() {
    const found = new Map([...this.blocks].map((block) => [block, []]));
    for (const column of this.#columns) found.get(column.block)?.push(column);
    return [...found].map(([block, columns]) =>
      bracket(block, columns, !this.#unfolded.has(block), () => this.#toggle(block)),
    );
  }

  #toggle(block) {
    if (!this.#unfolded.delete(block)) this.#unfolded.add(block);
    this.#build();
    this.#place.querySelector(`.bracket[data-block="${CSS.escape(block)}"]`)?.focus();
  }

  #inView({ target, isIntersecting }) {
    const column = this.#columns.find((one) => this.#elements.get(one) === target);
    if (!column) return;
    if (isIntersecting) this.#fill(column);
    else if (!target.contains(document.activeElement) && !target.querySelector(TAB_STOP)) this.#empty(column);
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
    this.#showFoot(column, null);
    this.#keepOneTabStop();
    try {
      await this.#show(column, indices, buttons);
    } catch (error) {
      if (error.name !== "AbortError")
        place.replaceChildren(make("p", { class: "soft nothing" }, error.message));
    }
  }

  /** Which maps, values or labels a column shows now. */
  #indices(column) {
    const count = Math.min(capacity(column), column.layer.shape[0] - column.first);
    const inOrder = Array.from({ length: count }, (_, row) => column.first + row);
    return this.#isOrdered(column) ? inOrder.map((at) => this.#order[at]) : inOrder;
  }

  /** Whether its values stand in the labels' order. */
  #isOrdered({ content, layer }) {
    return content === "labels" && layer.shape[0] === this.#order?.length;
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
    const label = this.#label(column, index);
    const button = mapButton(column, index, row, label, () => this.#acts.open(layer, index));
    const isOpen = this.#opened?.layer === layer && this.#opened.index === index;
    if (isOpen) button.setAttribute("aria-current", "true");
    return button;
  }

  /** Of a value that belongs to one; a single logit is that of the second. */
  #label({ content, layer }, index) {
    if (content !== "labels") return null;
    const { labels } = this.#description;
    return layer.shape[0] === 1 ? labels[labels.length - 1] : labels[index];
  }

  async #show(column, indices, buttons) {
    const { layer, content, first } = column;
    const all = content === "labels"; // they need not stand in their own order
    const array = await this.#tensors.maps(layer.tensor, all ? 0 : first, all ? 0 : indices.length);
    if (!buttons[0].isConnected) return; // it went out of view meanwhile
    const scale = await this.#scales.ofLayer(layer);
    if (content === "maps") {
      const size = layer.shape[1] * layer.shape[2];
      const maps = buttons.map((_, row) => array.values.subarray(row * size, (row + 1) * size));
      const each = await this.#scalesOfEach(layer, first, maps);
      if (!buttons[0].isConnected) return;
      buttons.forEach((button, row) => {
        this.#values.set(button, maps[row]);
        paintMap(button, maps[row], layer, each ? each[row] : scale);
      });
      this.#showFoot(column, scale, each !== null);
      return;
    }
    buttons.forEach((button, row) => {
      const at = all ? indices[row] : row;
      showValue(button, array.values[at], scale, this.#label(column, indices[row]));
    });
    this.#showFoot(column, scale);
  }

  /** The scale of each map by itself; null where all maps share that of the layer. */
  async #scalesOfEach(layer, first, maps) {
    if (this.#stretch === "always") return this.#scales.ofEach(maps);
    const isPale = this.#stretch === "pale" && (await this.#scales.isPale(layer));
    return isPale ? this.#scales.ofEachKept(layer, first, maps) : null;
  }

  /** @param {import("./colours.js").Scale | null} scale null: not known yet @param {boolean} [each] whether each map has its own */
  #showFoot(column, scale, each = false) {
    this.#elements.get(column).dataset.stretched = String(each);
    const turn = async (step) => {
      await this.#turn(column, column.first + step);
      const pager = this.#elements.get(column).querySelector(".pager");
      (
        pager.querySelector(`button[data-step="${step}"]:enabled`) ?? pager.querySelector("button:enabled")
      )?.focus();
    };
    this.#elements
      .get(column)
      .querySelector(".foot")
      .replaceChildren(...foot(column, scale, each, turn));
  }

  /** Show other maps of a column, from the `first` on. */
  async #turn(column, first) {
    column.first = first;
    this.#empty(column);
    this.#edges.draw(this.#columns, reach(this.#columns), HEIGHT);
    await this.#fill(column);
  }

  // --- pointing and keys ---

  #listen() {
    const { signal } = this.#listening;
    const on = (event, heard) => this.#place.addEventListener(event, heard, { signal });
    on("pointermove", (event) => this.#point(event.target.closest(".map"), event));
    on("pointerleave", () => this.#point(null));
    on("focusin", ({ target }) => target.matches(".map") && this.#focused(target));
    on("focusout", () => this.#point(null));
    on("keydown", (event) => this.#key(event));
  }

  #focused(button) {
    this.#keepOneTabStop(button);
    this.#point(button);
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
    const { layer } = column;
    const [y, x] = pixelAt(button, event, layer);
    this.#acts.point(layer, y, x, this.#values.get(button)?.[y * layer.shape[2] + x]);
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
    button.focus();
    button.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  /** Tab comes to one map: the last that had the focus, or else the first. @param {HTMLElement} [focused] */
  #keepOneTabStop(focused) {
    if (!focused && this.#visited?.isConnected) return;
    for (const stop of this.#place.querySelectorAll(TAB_STOP)) stop.setAttribute("tabindex", "-1");
    if (focused) this.#visited = focused;
    (focused ?? this.#place.querySelector(".map"))?.setAttribute("tabindex", "0");
  }

  /** @type {HTMLElement | null} the map that last had the focus */
  #visited = null;
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

function paintMap(button, values, { shape: [, height, width] }, scale) {
  const canvas = button.firstChild;
  paint(canvas, values, height, width, scale);
  canvas.classList.toggle("pixels", width <= 2 * SIDE);
  setStyles(button, { "--ratio": width / height });
}
