/** The connections between the maps of neighbouring columns, and the ways around blocks, as a few SVG paths. */

import { middle } from "./columns.js";
import { draw } from "./dom.js";
import { linked } from "./links.js";

/** @typedef {import("./columns.js").Column} Column */

/** Height of the first line that goes around columns. */
const AROUND = 114;

export class Edges {
  constructor() {
    this.#faint = draw("g", {});
    this.#around = draw("path", { class: "around" });
    this.#strong = draw("path", { class: "strong" });
    this.element = draw(
      "svg",
      { class: "edges", "aria-hidden": "true" },
      this.#faint,
      this.#around,
      this.#strong,
    );
  }

  #faint;
  #around;
  #strong;
  /** @type {Column[]} */
  #columns = [];
  /** @type {Map<string, number>} the column that shows a tensor */
  #shownIn = new Map();

  /** Draw them anew. @param {Column[]} columns @param {number} width @param {number} height CSS pixels */
  draw(columns, width, height) {
    this.#columns = columns;
    this.#shownIn = new Map(
      columns.flatMap((column, at) => column.layers.map((layer) => [layer.tensor, at])),
    );
    this.element.setAttribute("width", String(width));
    this.element.setAttribute("height", String(height));
    const faint = [];
    const around = [];
    columns.forEach((column, at) => {
      for (const source of this.#sourcesOf(at)) {
        if (source === at - 1)
          faint.push(draw("path", { class: "faint", d: this.#between(columns[source], column).join("") }));
        else around.push(detour(columns[source], column));
      }
    });
    this.#faint.replaceChildren(...faint); // a path for each column, so that what is out of view is not painted
    this.#around.setAttribute("d", around.join(""));
    this.highlight(null, 0);
  }

  /** Show what a map is made of. @param {Column | null} column @param {number} row of those that are shown */
  highlight(column, row) {
    if (!column) {
      this.#strong.setAttribute("d", "");
      return;
    }
    const at = this.#columns.indexOf(column);
    const paths = this.#sourcesOf(at).flatMap((source) => this.#toRow(this.#columns[source], column, row));
    const next = this.#columns[at + 1];
    if (next && this.#sourcesOf(at + 1).includes(at)) paths.push(...this.#fromRow(column, row, next));
    this.#strong.setAttribute("d", paths.join(""));
  }

  /** Places of the columns that a column reads; what is hidden inside its own folded block is not among them. */
  #sourcesOf(at) {
    const inside = new Set(this.#columns[at].layers.map(({ tensor }) => tensor));
    const outside = this.#columns[at].layers
      .flatMap(({ sources }) => sources)
      .filter((tensor) => !inside.has(tensor));
    return [
      ...new Set(outside.map((tensor) => this.#shownIn.get(tensor)).filter((source) => source !== undefined)),
    ];
  }

  #between(source, target) {
    return rows(target).flatMap((row) => this.#toRow(source, target, row));
  }

  #toRow(source, target, row) {
    const range = this.#range(source, target, row);
    return rows(source)
      .filter((other) => isWithin(source.indices[other], range))
      .map((other) => curve(source, other, target, row));
  }

  #fromRow(source, row, target) {
    return rows(target)
      .filter((other) => isWithin(source.indices[row], this.#range(source, target, other)))
      .map((other) => curve(source, row, target, other));
  }

  /** The maps of `source` that a row of `target` reads: all, where a folded block is between them. */
  #range(source, target, row) {
    if (target.layers.length > 1 && !target.isPair) return [0, source.layer.shape[0]];
    const layers = this.#columns.flatMap((column) => column.layers);
    const [layer] = target.layers; // the others of a pair keep each map to itself
    const sources = layer.sources
      .map((tensor) => layers.find((one) => one.tensor === tensor))
      .filter(Boolean);
    return linked(layer, target.indices[row] ?? 0, source.layer, sources);
  }
}

/** Numbers of the rows that a column has on show. @param {Column} column */
function rows(column) {
  return column.content === "nothing" ? [0] : column.indices.map((_, row) => row);
}

/** @param {number | undefined} index of a map; none where a column has no maps @param {[number, number] | null} range */
function isWithin(index = 0, range) {
  return range !== null && index >= range[0] && index <= range[1];
}

function curve(source, row, target, other) {
  const [x, y] = [edge(source, 1), middle(source, row)];
  const [toX, toY] = [edge(target, -1), middle(target, other)];
  const bend = (toX - x) / 2;
  return `M${x} ${y}C${x + bend} ${y} ${toX - bend} ${toY} ${toX} ${toY}`;
}

/** A column's right (1) or left (-1) side, where its lines begin or end. */
function edge(column, side) {
  const half = column.content === "labels" ? column.width / 2 : column.side / 2;
  return column.left + column.width / 2 + side * (half + 2);
}

/** From above one column to above another. */
function detour(source, target) {
  const from = source.left + source.width / 2;
  const to = target.left + target.width / 2;
  const low = AROUND + 14;
  return `M${from} ${low}V${AROUND + 6}q0 -6 6 -6H${to - 6}q6 0 6 6V${low}`;
}
