/** A map that grows, place by place, under the window that slides: only what has been worked out is drawn. */

import { say, setStyles } from "../dom.js";
import { figure } from "../numbers.js";
import { Player } from "./player.js";

/** Milliseconds a place must last for its products to be drawn one after another. */
const SLOW = 700;

export class Growth {
  /**
   * @param {import("../mapview.js").MapView} map that the layer makes; it is drawn in the arithmetic, as are all with the class "grows"
   * @param {ArrayLike<number>} values of the map
   * @param {(row: number, column: number) => void} choose works out a place
   */
  constructor(map, values, choose) {
    this.#map = map;
    this.#values = values;
    this.#choose = choose;
    this.#player = new Player(map.height * map.width, (at, milliseconds) => this.#grow(at, milliseconds));
    this.element = this.#player.element;
  }

  #map;
  #values;
  #choose;
  #player;

  /** Whether only a part of the map is drawn. */
  isGrowing = false;

  /** Draw the whole map. */
  end() {
    this.isGrowing = false;
    this.#player.reset();
    this.#stage?.classList.remove("growing", "slow");
  }

  /** The part of the page in which maps grow. @returns {HTMLElement | null} null: it is not on the page any more */
  get #stage() {
    return this.#map.element.closest(".arithmetic");
  }

  /** Draw the places up to `at`. */
  #grow(at, milliseconds) {
    const stage = this.#stage;
    if (!stage) return this.end();
    if (!this.isGrowing) this.#begin(stage);
    const { width } = this.#map;
    const [row, column] = [Math.floor(at / width), at % width];
    stage.classList.toggle("slow", milliseconds >= SLOW);
    setStyles(stage, { "--time": `${milliseconds}ms`, "--grown": this.#outline(at + 1) });
    this.#choose(row, column);
    if (at === this.#values.length - 1) this.isGrowing = false; // the map is whole
    if (!this.#player.isPlaying) say(`Row ${row}, column ${column}: ${figure(this.#values[at])}`);
  }

  /** Begin with nothing, so that the first place too is drawn when its time has come. */
  #begin(stage) {
    this.isGrowing = true;
    setStyles(stage, { "--grown": this.#outline(0) });
    stage.classList.add("growing");
    this.#map.area.getBoundingClientRect(); // the browser takes it in
  }

  /** The outline of the first `count` places: whole rows, and a part of the next one. */
  #outline(count) {
    const { height, width } = this.#map;
    const row = Math.floor(count / width);
    const [top, bottom] = [row, Math.min(height, row + 1)].map((at) => `${(100 * at) / height}%`);
    const right = `${(100 * (count % width)) / width}%`;
    return `polygon(0 0, 100% 0, 100% ${top}, ${right} ${top}, ${right} ${bottom}, 0 ${bottom})`;
  }
}
