/** A function as a curve, with a point that moves on it. */

import { draw } from "../dom.js";
import { figure } from "../numbers.js";

/** Of the drawing, in its own units. */
const [WIDTH, HEIGHT, MARGIN] = [220, 170, 19];
const POINTS = 120;

export class Curve {
  /**
   * @param {(x: number) => number} of
   * @param {number} lowest @param {number} highest what x can be
   */
  constructor(of, lowest, highest) {
    this.#of = of;
    const room = (highest - lowest || 1) * 0.08;
    this.#x = [Math.min(0, lowest - room), Math.max(0, highest + room)];
    const xs = Array.from(
      { length: POINTS + 1 },
      (_, at) => this.#x[0] + ((this.#x[1] - this.#x[0]) * at) / POINTS,
    );
    const ys = xs.map(of).filter(Number.isFinite);
    this.#y = [Math.min(0, ...ys), Math.max(0, ...ys)];
    if (this.#y[0] === this.#y[1]) this.#y[1] += 1;
    this.#dot = draw("circle", { class: "dot", r: 5 });
    this.#drop = draw("path", { class: "drop" });
    this.element = draw(
      "svg",
      {
        class: "curve",
        viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
        role: "img",
        "aria-label": `The function from ${figure(this.#x[0], 2)} to ${figure(this.#x[1], 2)}`,
      },
      draw("path", { class: "axis", d: this.#axes() }),
      draw("path", { class: "line", d: this.#line(xs) }),
      ...this.#ends(),
      this.#drop,
      this.#dot,
    );
  }

  #of;
  #x;
  #y;
  #dot;
  #drop;

  /** Move the point to x. */
  point(x) {
    const y = this.#of(x);
    this.#dot.setAttribute("cx", this.#across(x));
    this.#dot.setAttribute("cy", this.#down(y));
    this.#drop.setAttribute("d", `M${this.#across(x)} ${this.#down(0)}V${this.#down(y)}H${this.#across(0)}`);
  }

  #axes() {
    return `M${MARGIN} ${this.#down(0)}H${WIDTH - MARGIN}M${this.#across(0)} ${MARGIN}V${HEIGHT - MARGIN}`;
  }

  /** The numbers at those ends of the axes that are far from zero. */
  #ends() {
    const end = (value, x, y) => draw("text", { x: round(x), y: round(y) }, figure(value, 2));
    const far = (value, zero) => Math.abs(value - zero) > MARGIN;
    return [
      ...this.#x
        .filter((x) => far(this.#across(x), this.#across(0)))
        .map((x) => end(x, this.#across(x), this.#down(0) + 10)),
      ...this.#y
        .filter((y) => far(this.#down(y), this.#down(0)))
        .map((y) => end(y, this.#across(0), this.#down(y) + (y > 0 ? -4 : 10))),
    ];
  }

  #line(xs) {
    const points = xs.filter((x) => Number.isFinite(this.#of(x)));
    return points.map((x, at) => `${at ? "L" : "M"}${this.#across(x)} ${this.#down(this.#of(x))}`).join("");
  }

  #across(x) {
    return round(MARGIN + ((x - this.#x[0]) / (this.#x[1] - this.#x[0])) * (WIDTH - 2 * MARGIN));
  }

  #down(y) {
    return round(HEIGHT - MARGIN - ((y - this.#y[0]) / (this.#y[1] - this.#y[0])) * (HEIGHT - 2 * MARGIN));
  }
}

function round(value) {
  return Math.round(100 * value) / 100;
}
