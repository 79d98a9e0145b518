/** Layers as columns from left to right: folded blocks, places, and what each column shows. All lengths are CSS pixels. */

import { ACTIVATIONS } from "./names.js";

/** @typedef {import("./api.js").Layer} Layer */
/**
 * @typedef {object} Column
 * @property {Layer[]} layers one, or all that are folded into this column
 * @property {Layer} layer the last of them, whose maps are shown
 * @property {string} number of the layers, counted from 1
 * @property {string | null} block that the layers belong to
 * @property {boolean} isPair whether a layer is folded with its norm and activation, and not a block
 * @property {"maps" | "labels" | "values" | "nothing"} content
 * @property {number} left
 * @property {number} width
 * @property {number} side of a map
 * @property {number} pitch from row to row
 * @property {number} first how many maps come before those that are shown
 * @property {number[] | null} order of all its maps, values or labels; null: their own
 * @property {number[]} indices of the maps, values or labels that are shown
 */

/** Networks of more layers start with their blocks folded. */
export const FOLDED_BEYOND = 30;
/** Maps that a column shows at a time. */
export const SHOWN = 10;
/** Labels that a column shows at a time. */
export const LABELS_SHOWN = 10;

/** From the top of the network to its first row: titles are there. */
const TOP = 132;

/** Sizes of a column, the largest first. `window` is the least height of a window that it is for. */
const SIZES = [
  {
    window: 1080,
    side: 64,
    pitch: 68,
    wide: { maps: 128, labels: 190, gap: 16 },
    narrow: { maps: 88, labels: 140, gap: 4 },
  },
  {
    window: 0,
    side: 44,
    pitch: 48,
    wide: { maps: 100, labels: 158, gap: 14 },
    narrow: { maps: 64, labels: 104, gap: 2 },
  },
];
/** The largest gap, where there is room to spare. */
const WIDEST_GAP = 48;
/** Of a network that scrolls: as many maps as possible, but readable labels. */
const SCROLLED = { maps: 64, labels: 158, gap: 2 };

/** Names of the blocks that have more than one layer. @param {Layer[]} layers */
export function blocks(layers) {
  return new Set(
    blockRuns(layers)
      .filter((run) => run.length > 1)
      .map(([first]) => first.block),
  );
}

/**
 * @param {Layer[]} layers
 * @param {{unfolded: Set<string>, pairs: boolean}} folding names of the blocks that are unfolded, and whether each layer
 *   and its norm and activation are folded into a column
 * @param {number} labels how many the model has
 * @param {{width: number, height: number}} room of the network, and of the window
 * @returns {Column[]} of the largest size with which all fit, or else of the smallest
 */
export function arrange(layers, folding, labels, room) {
  const parts = foldedParts(layers, folding);
  for (const size of SIZES) {
    if (room.height < size.window) continue;
    const [narrow, wide] = [size.narrow, size.wide].map((widths) => reach(place(parts, labels, size, widths)));
    if (narrow > room.width) continue;
    const share = Math.min(1, (room.width - narrow) / (wide - narrow));
    const between = (name) => Math.floor(size.narrow[name] + share * (size.wide[name] - size.narrow[name]));
    const spare = Math.floor(Math.max(0, room.width - wide) / (parts.length + 1));
    const gap = Math.min(WIDEST_GAP, between("gap") + spare);
    return place(parts, labels, size, { maps: between("maps"), labels: between("labels"), gap });
  }
  return place(parts, labels, SIZES[SIZES.length - 1], SCROLLED);
}

/** Whether columns are too narrow for large words. @param {Column[]} columns */
export function areNarrow(columns) {
  return columns.some(({ width, content }) => content !== "labels" && width < 100);
}

/** The width of all columns. @param {Column[]} columns */
export function reach(columns) {
  const last = columns[columns.length - 1];
  return last.left + last.width + columns[0].left;
}

/** From the top to the last row's lower edge. @param {Column[]} columns */
export function bottom([{ pitch }]) {
  return TOP + SHOWN * pitch;
}

/** @param {Layer[][]} parts @returns {Column[]} */
function place(parts, labels, { side, pitch }, widths) {
  const numbers = new Map(parts.flat().map((layer, at) => [layer, at + 1]));
  let left = widths.gap;
  return parts.map((layers) => {
    const layer = layers[layers.length - 1];
    const [from, to] = [numbers.get(layers[0]), numbers.get(layer)];
    const content = contentOf(layer, labels);
    const width = content === "labels" ? widths.labels : widths.maps;
    const column = {
      layers,
      layer,
      number: from === to ? `${to}` : `${from}–${to}`,
      block: layer.block,
      isPair: layers.length > 1 && isPaired(layers),
      content,
      left,
      width,
      side,
      pitch,
      first: 0,
      order: null,
      indices: [],
    };
    column.indices = inOrder(column);
    left += width + widths.gap;
    return column;
  });
}

/** Where the middle of a column's row is. @param {Column} column @param {number} row 0 … the number that is shown */
export function middle({ side, pitch }, row) {
  return TOP + row * pitch + side / 2;
}

/** How many of a column's maps, values or labels are shown at a time. @param {Column} column */
export function capacity({ content }) {
  return content === "labels" ? LABELS_SHOWN : SHOWN;
}

/** Which maps a column shows that shows them in their own order. @param {Column} column @returns {number[]} */
export function inOrder(column) {
  if (column.content === "nothing") return [];
  const count = Math.min(capacity(column), column.layer.shape[0] - column.first);
  return Array.from({ length: count }, (_, row) => column.first + row);
}

/** The layers of each column. @returns {Layer[][]} */
function foldedParts(layers, { unfolded, pairs }) {
  const parts = blockRuns(layers).flatMap((run) =>
    run.length > 1 && !unfolded.has(run[0].block) ? [run] : run.map((layer) => [layer]),
  );
  return pairs ? joined(parts, isPaired) : parts;
}

/** Neighbours with the same block, together. @returns {Layer[][]} */
function blockRuns(layers) {
  const parts = layers.map((layer) => [layer]);
  return joined(parts, ([first, ...others]) => others.every(({ block }) => block && block === first.block));
}

/** Neighbouring parts together, as long as they belong together. @returns {Layer[][]} */
function joined(parts, belong) {
  const found = [];
  for (const part of parts) {
    const last = found[found.length - 1];
    if (last && belong([...last, ...part])) last.push(...part);
    else found.push([...part]);
  }
  return found;
}

/** Whether all but the first are norms and activations of the one before them. @param {Layer[]} layers */
function isPaired([first, ...others]) {
  return others.every(({ kind, sources, shape, block }, at) => {
    const before = at ? others[at - 1] : first;
    const follows = sources.length === 1 && sources[0] === before.tensor && shape.length === before.shape.length;
    const isKind = kind === "BatchNormalization" || ACTIVATIONS.has(kind);
    return follows && isKind && block === before.block && before.kind !== "Input";
  });
}

function contentOf({ shape }, labels) {
  if (shape.length === 3) return "maps";
  if (shape.length !== 1) return "nothing";
  return shape[0] === labels || (labels === 2 && shape[0] === 1) ? "labels" : "values";
}
