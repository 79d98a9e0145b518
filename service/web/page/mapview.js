/** One map, enlarged: its pixels can be pointed at and walked over by arrow keys, and a part of it marked. */

import { legend } from "./colours.js";
import { make, setStyles } from "./dom.js";
import { paint } from "./paint.js";

/** Keys and what they add to row and column. */
const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

export class MapView {
  /**
   * @param {object} options
   * @param {string} options.name
   * @param {Node} [options.link] stands below the map in place of its name
   * @param {ArrayLike<number>} options.values (height, width)
   * @param {[number, number]} options.size height and width
   * @param {import("./colours.js").Scale} options.scale
   * @param {boolean} [options.keyed] show what the colours mean
   * @param {number[]} [options.padding] top, left, bottom, right: drawn as a border of nothing
   * @param {boolean} [options.grows] whether it is drawn place by place while a map grows
   * @param {(row: number, column: number, how: "over" | "click" | "key") => void} [options.pick]
   */
  constructor({ name, link, values, size, scale, keyed = true, padding = [0, 0, 0, 0], grows = false, pick }) {
    [this.height, this.width] = size;
    this.#padding = padding;
    this.#pick = pick;
    const canvas = make("canvas", { class: "pixels", "aria-hidden": "true" });
    paint(canvas, values, this.height, this.width, scale);
    this.#mark = make("div", { class: "window", hidden: true });
    this.area = make("div", { class: "area" }, canvas, this.#mark);
    this.element = make(
      "figure",
      { class: grows ? "mapview grows" : "mapview" },
      this.area,
      make("figcaption", {}, link ?? name),
      keyed && legend(scale),
    );
    this.#lay(canvas, 0, 0, this.height, this.width);
    setStyles(this.area, { "--ratio": this.#across / this.#down });
    if (pick) this.#listen(name);
  }

  #padding;
  #pick;
  #mark;
  #at = [0, 0];

  get #down() {
    return this.height + this.#padding[0] + this.#padding[2];
  }

  get #across() {
    return this.width + this.#padding[1] + this.#padding[3];
  }

  /** Mark a part, which may reach into the padding. */
  mark(row, column, height = 1, width = 1) {
    this.#at = [row, column];
    this.#mark.hidden = false;
    this.#lay(this.#mark, row, column, height, width);
  }

  #lay(element, row, column, height, width) {
    const [top, left] = this.#padding;
    setStyles(element, {
      top: `${(100 * (row + top)) / this.#down}%`,
      left: `${(100 * (column + left)) / this.#across}%`,
      height: `${(100 * height) / this.#down}%`,
      width: `${(100 * width) / this.#across}%`,
    });
  }

  #listen(name) {
    this.area.tabIndex = 0;
    this.area.setAttribute("role", "application");
    this.area.setAttribute("aria-roledescription", "map");
    this.area.setAttribute("aria-label", `${name}. Arrow keys choose a pixel`);
    this.area.classList.add("live");
    this.area.addEventListener("pointermove", (event) => this.#pick(...this.#pixel(event), "over"));
    this.area.addEventListener("click", (event) => this.#pick(...this.#pixel(event), "click"));
    this.area.addEventListener("keydown", (event) => this.#key(event));
  }

  #key(event) {
    if (!(event.key in STEPS)) return;
    event.preventDefault();
    const [down, across] = STEPS[event.key];
    this.#pick(within(this.#at[0] + down, this.height), within(this.#at[1] + across, this.width), "key");
  }

  #pixel(event) {
    const { top, left, height, width } = this.area.getBoundingClientRect();
    const row = Math.floor(((event.clientY - top) / height) * this.#down) - this.#padding[0];
    const column = Math.floor(((event.clientX - left) / width) * this.#across) - this.#padding[1];
    return [within(row, this.height), within(column, this.width)];
  }
}

function within(at, size) {
  return Math.max(0, Math.min(size - 1, at));
}
