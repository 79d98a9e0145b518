/** The network from left to right: a column for each layer or folded block, with its maps as small multiples. */

import {
  FOLDED_BEYOND,
  LABELS_SHOWN,
  areNarrow,
  arrange,
  blocks,
  bottom,
  capacity,
  inOrder,
  reach,
} from "./columns.js";
import { bracket, columnElement, foot, mapButton, showValue } from "./columnview.js";
import { make, setStyles } from "./dom.js";
import { Edges } from "./edges.js";
import { MapOrder } from "./order.js";
import { paint } from "./paint.js";
import { LayerScales } from "./scales.js";
import { scrollByWheel } from "./sideways.js";

/** @typedef {import("./columns.js").Column} Column */
/** @typedef {import("./api.js").Layer} Layer */

/** Height of what is below a column's maps, CSS pixels: the pager and the legend. */
const FOOT = 56;
/** Time without a change of the window's size after which columns are arranged anew, milliseconds. */
const SETTLED = 150;
/** How near a column must come before its maps are asked for, CSS pixels. */
const NEAR = "500px";
/** The map that Tab comes to. */
const TAB_STOP = '.map[tabindex="0"]';

/**
 * @typedef {"pale" | "always" | "never" | "stage" | "network"} Stretch what has the whole range of colours: the maps of pale
 *   layers or all maps, each by itself; or all maps of a layer, of a stage or of the network together
 */

export class Network {
  /**
   * @param {HTMLElement} place scrolls sideways
   * @param {import("./api.js").Description} description
   * @param {import("./tensors.js").Tensors} tensors
   * @param {object} acts
   * @param {(layer: Layer, index: number) => void} acts.open a map or a value was chosen
   * @param {(layer: Layer | null, row?: number, column?: number, value?: number) => void} acts.point the layer that
   *   is pointed at, the pixel of its map, and what that is
   * @param {{stretch: Stretch, pairs: boolean, order: import("./order.js").OrderName}} display
   */
  constructor(place, description, tensors, acts, { stretch, pairs, order }) {
    this.#mapOrder = new MapOrder(description, tensors, order);
    this.#stretch = stretch;
    this.#pairs = pairs;
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
    this.#arrangeAnewWhenResized();
  }

  #place;
  #description;
  #tensors;
  #acts;
  #unfolded;
  #observer;
  /** @type {Promise<number[]> | null} labels as their columns show them; null until that is needed */
  #labels = null;
  /** @type {MapOrder} */
  #mapOrder;
  #edges = new Edges();
  /** Whether each layer is folded with its norm and activation. */
  #pairs;
  /** Told of the first and the last layer that are in view. */
  #watcher = (_first, _last) => {};
  /** @type {ResizeObserver} */
  #resizes;
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
    this.#resizes.disconnect();
    this.#listening.abort();
    this.#place.replaceChildren();
  }

  /** Fold all blocks, or unfold them. */
  foldAll(fold) {
    this.#unfolded = fold ? new Set() : new Set(this.blocks);
    this.#build();
  }

  /** Fold each layer with its norm and activation, or unfold them. */
  foldPairs(fold) {
    this.#pairs = fold;
    this.#build();
  }

  /** Choose what has the whole range of colours. @param {Stretch} which */
  stretch(which) {
    this.#stretch = which;
    this.#fillAnew();
  }

  /**
   * Show the maps of each layer in another order. @param {import("./order.js").OrderName} name
   * @param {string | null} label whose score maps contribute to
   */
  orderMaps(name, label) {
    const before = this.#mapOrder.name;
    this.#mapOrder = new MapOrder(this.#description, this.#tensors, name, label);
    if (name === before && name !== "contribution") return;
    for (const column of this.#columns.filter(({ content }) => content === "maps" || content === "values")) {
      Object.assign(column, { first: 0, order: null });
      column.indices = this.#indices(column);
    }
    this.#drawEdges();
    this.#fillAnew();
  }

  /** Show again what is in view. */
  #fillAnew() {
    for (const column of this.#columns) {
      if (!this.#elements.get(column).querySelector(".maps").childElementCount) continue;
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
    const button = this.#buttonOf(layer, index);
    button?.setAttribute("aria-current", "true");
    button?.scrollIntoView({ block: "nearest", inline: "nearest" }); // its arithmetic may cover it
  }

  /** Put the focus on a map. */
  focus(layer, index) {
    this.#buttonOf(layer, index)?.focus();
  }

  /** Scroll sideways to a layer's column, or to that of its folded block, and mark its title. */
  scrollTo(layer) {
    const column = this.#columnOf(layer);
    if (!column) return;
    this.#scrollToMiddle(column);
    for (const [one, element] of this.#elements) element.classList.toggle("sought", one === column);
  }

  /** Scroll to a layer, out of its folded block if need be. */
  show(layer) {
    const { layers, block, isPair } = this.#columnOf(layer);
    if (layers.length > 1 && !isPair) {
      this.#unfolded.add(block);
      this.#build();
    }
    this.scrollTo(layer);
  }

  /** Scroll to a layer's column, and put the focus on its first map. */
  async enter(layer) {
    this.scrollTo(layer);
    await this.#goTo(this.#columns.indexOf(this.#columnOf(layer)), 0, -1);
  }

  /** Call a function with the first and the last layer that are in view, now and whenever they change. */
  watch(watcher) {
    this.#watcher = watcher;
    this.#tellView();
  }

  /** @param {Column} column @param {ScrollBehavior} [behavior] */
  #scrollToMiddle({ left, width }, behavior) {
    this.#place.scrollTo({ left: left + width / 2 - this.#place.clientWidth / 2, behavior });
  }

  #columnOf(layer) {
    return this.#columns.find(({ layers }) => layers.includes(layer));
  }

  #tellView() {
    const { scrollLeft, clientWidth } = this.#place;
    const inView = this.#columns.filter(
      ({ left, width }) => left + width / 2 >= scrollLeft && left + width / 2 <= scrollLeft + clientWidth,
    );
    if (inView.length) this.#watcher(inView[0].layers[0], inView[inView.length - 1].layer);
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
    if (this.#mayBeOrdered(column)) await this.#putInOrder(column);
    const at = column.order ? column.order.indexOf(index) : index;
    await this.#turn(column, at - (at % capacity(column)));
  }

  // --- the columns ---

  #build() {
    this.#observer.disconnect();
    const pages = new Map(this.#columns.map(({ layer, first }) => [layer, first]));
    this.#columns = this.#arranged();
    for (const column of this.#columns) column.first = pages.get(column.layer) ?? 0;
    const height = this.#height;
    this.#elements = new Map(this.#columns.map((column) => [column, columnElement(column, height)]));
    const width = reach(this.#columns);
    const canvas = make(
      "div",
      { class: areNarrow(this.#columns) ? "canvas narrow" : "canvas" },
      this.#edges.element,
      ...this.#brackets(),
      ...this.#elements.values(),
    );
    setStyles(canvas, { width: `${width}px`, height: `${height}px`, "--side": `${this.#columns[0].side}px` });
    this.#place.replaceChildren(canvas);
    this.#drawEdges();
    for (const element of this.#elements.values()) this.#observer.observe(element);
    this.#tellView();
  }

  #drawEdges() {
    this.#edges.draw(this.#columns, reach(this.#columns), this.#height);
  }

  #arranged() {
    const { layers, labels } = this.#description;
    const folding = { unfolded: this.#unfolded, pairs: this.#pairs };
    const room = { width: this.#place.clientWidth, height: window.innerHeight };
    return arrange(layers, folding, labels.length, room);
  }

  get #height() {
    return bottom(this.#columns) + FOOT;
  }

  /** Use the room that there is. What was in the middle stays there, and the focus stays on its map. */
  #arrangeAnewWhenResized() {
    const { signal } = this.#listening;
    let timer;
    const arrangeAnew = async () => {
      const places = (columns) => columns.map(({ left, side }) => `${left} ${side}`).join();
      if (places(this.#arranged()) === places(this.#columns)) return;
      const middle = this.#place.scrollLeft + this.#place.clientWidth / 2;
      const central = this.#columns.findLast(({ left }) => left <= middle)?.layer;
      const focused = this.#place.contains(document.activeElement) ? document.activeElement.dataset : {};
      this.#build();
      if (central) this.#scrollToMiddle(this.#columnOf(central), "instant");
      const column = focused.index && this.#columns.find(({ layer }) => layer.tensor === focused.tensor);
      if (!column) return;
      await this.#fill(column);
      this.#buttonOf(column.layer, focused.index)?.focus({ preventScroll: true });
    };
    const resized = () => {
      clearTimeout(timer);
      timer = setTimeout(arrangeAnew, SETTLED);
    };
    this.#resizes = new ResizeObserver(resized);
    this.#resizes.observe(this.#place);
    window.addEventListener("resize", resized, { signal });
    signal.addEventListener("abort", () => clearTimeout(timer));
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
    if (this.#mayBeOrdered(column) && !(await this.#putInOrder(column))) return;
    if (place.childElementCount) return; // it was filled while the order was waited for
    column.indices = this.#indices(column);
    const { indices } = column;
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
    return inOrder(column).map((at) => (column.order ? column.order[at] : at));
  }

  #mayBeOrdered({ content }) {
    return content === "labels" || this.#mapOrder.name !== "network";
  }

  /** Find out a column's order. @returns {Promise<boolean>} whether it is still asked for */
  async #putInOrder(column) {
    const asked = this.#mapOrder;
    const { layer, content } = column;
    if (content === "labels") {
      this.#labels ??= this.#labelOrder();
      const order = await this.#labels;
      column.order = order.length === layer.shape[0] ? order : null;
      return true;
    }
    const order = await asked.of(layer).catch(() => null); // its own order is better than none
    if (asked !== this.#mapOrder || !this.#elements.has(column)) return false;
    column.order = order;
    column.indices = this.#indices(column);
    this.#drawEdges();
    return true;
  }

  /** Labels in their own order where all are shown, else the most probable first. */
  async #labelOrder() {
    const { layers, labels } = this.#description;
    const indices = labels.map((_, index) => index);
    if (labels.length <= LABELS_SHOWN) return indices;
    try {
      const { values } = await this.#tensors.maps(layers[layers.length - 1].tensor);
      return indices.sort((one, other) => values[other] - values[one]);
    } catch {
      return indices;
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
    const { layer, content } = column;
    const all = content === "labels"; // other columns of labels need them too
    const array = await (all ? this.#tensors.maps(layer.tensor) : this.#tensors.selected(layer.tensor, indices));
    if (!buttons[0].isConnected) return; // it went out of view meanwhile
    const scale = await this.#scales.ofLayer(layer, this.#stretch);
    if (content === "maps") {
      const size = layer.shape[1] * layer.shape[2];
      const maps = buttons.map((_, row) => array.values.subarray(row * size, (row + 1) * size));
      const each = await this.#scalesOfEach(layer, indices, maps);
      if (!buttons[0].isConnected) return;
      buttons.forEach((button, row) => {
        this.#values.set(button, maps[row]);
        paintMap(button, maps[row], column, each ? each[row] : scale);
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
  async #scalesOfEach(layer, indices, maps) {
    if (this.#stretch === "always") return this.#scales.ofEach(maps);
    const isPale = this.#stretch === "pale" && (await this.#scales.isPale(layer));
    return isPale ? this.#scales.ofEachKept(layer, indices, maps) : null;
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
    column.indices = this.#indices(column);
    this.#empty(column);
    this.#drawEdges();
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
    on("scroll", () => this.#tellView());
    scrollByWheel(this.#place, signal);
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

  /** Arrows go from map to map, Home and End to the first and the last column; Tab leaves the network. */
  #key(event) {
    const button = event.target.closest(".map");
    const row = Number(button?.dataset.row ?? 0);
    const ends = { Home: [0, 1], End: [this.#columns.length - 1, -1] };
    const moves = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };
    if (event.key in ends) {
      const [at, inward] = ends[event.key];
      event.preventDefault();
      this.#goTo(at, row, inward);
    } else if (button && event.key in moves) {
      const [across, down] = moves[event.key];
      const at = this.#columns.findIndex(({ layer }) => layer.tensor === button.dataset.tensor);
      event.preventDefault();
      this.#goTo(at + across, row + down, across);
    }
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

/** @param {Column} column */
function paintMap(button, values, { layer, side }, scale) {
  const [, height, width] = layer.shape;
  const canvas = button.firstChild;
  paint(canvas, values, height, width, scale);
  canvas.classList.toggle("pixels", width <= 2 * side);
  setStyles(button, { "--ratio": width / height });
}
