/** Layers as columns from left to right: folded blocks, places, and what each column shows. All lengths are CSS pixels. */

/** @typedef {import("./api.js").Layer} Layer */
/**
 * @typedef {object} Column
 * @property {Layer[]} layers one, or all of a folded block
 * @property {Layer} layer the last of them, whose maps are shown
 * @property {string} number of the layers, counted from 1
 * @property {string | null} block
 * @property {"maps" | "labels" | "values" | "nothing"} content
 * @property {number} left
 * @property {number} width
 * @property {number} first the first map that is shown
 */

/** Networks of more layers start with their blocks folded. */
export const FOLDED_BEYOND = 30;
/** Maps that a column shows at a time. */
export const SHOWN = 8;
/** Labels that a column shows at a time. */
export const LABELS_SHOWN = 10;
/** Side of a small map. */
export const SIDE = 52;

/** Between two columns, and before the first. */
const GAP = 14;
const WIDTH = { maps: 100, labels: 158, values: 100, nothing: 100 };
/** The same where all columns then fit on the screen, and would not otherwise; the gap is the smallest. */
const COMPACT_GAP = 4;
const COMPACT_WIDTH = { maps: 66, labels: 120, values: 66, nothing: 66 };
const TOP = 146;
const PITCH = { maps: 60, labels: 48, values: 60, nothing: 60 };
/** From the top to the last map's lower edge. */
export const BOTTOM = TOP + SHOWN * PITCH.maps;

/** Names of the blocks that have more than one layer. @param {Layer[]} layers */
export function blocks(layers) {
  return new Set(
    runs(layers)
      .filter((run) => run.length > 1)
      .map(([first]) => first.block),
  );
}

/**
 * @param {Layer[]} layers
 * @param {Set<string>} unfolded names of blocks whose layers all have a column
 * @param {number} labels how many the model has
 * @param {number} room width of the screen for all columns
 * @returns {Column[]}
 */
export function arrange(layers, unfolded, labels, room) {
  const columns = placed(layers, unfolded, labels, WIDTH, GAP);
  if (reach(columns) <= room) return columns;
  const compact = placed(layers, unfolded, labels, COMPACT_WIDTH, COMPACT_GAP);
  const spare = (room - reach(compact)) / (compact.length + 1);
  if (spare < 0) return columns;
  return placed(layers, unfolded, labels, COMPACT_WIDTH, Math.min(GAP, COMPACT_GAP + Math.floor(spare)));
}

/** Whether columns are narrower than they could be, so that all fit. @param {Column[]} columns */
export function areCompact(columns) {
  return columns.some(({ width, content }) => width < WIDTH[content]);
}

/** The width of all columns. @param {Column[]} columns */
export function reach(columns) {
  const last = columns[columns.length - 1];
  return last.left + last.width + columns[0].left;
}

/** @returns {Column[]} */
function placed(layers, unfolded, labels, widths, gap) {
  const numbers = new Map(layers.map((layer, at) => [layer, at + 1]));
  let left = gap;
  return runs(layers)
    .flatMap((run) => (run.length > 1 && !unfolded.has(run[0].block) ? [run] : run.map((layer) => [layer])))
    .map((held) => {
      const layer = held[held.length - 1];
      const content = contentOf(layer, labels);
      const [from, to] = [numbers.get(held[0]), numbers.get(layer)];
      const column = {
        layers: held,
        layer,
        number: from === to ? `${to}` : `${from}–${to}`,
        block: layer.block,
        content,
        left,
        width: widths[content],
        first: 0,
      };
      left += column.width + gap;
      return column;
    });
}

/** Where the middle of a column's row is. @param {Column} column @param {number} row 0 … the number that is shown */
export function middle(column, row) {
  return TOP + row * PITCH[column.content] + SIDE / 2;
}

/** How many of a column's maps, values or labels are shown at a time. */
export function capacity(column) {
  return column.content === "labels" ? LABELS_SHOWN : SHOWN;
}

/** Neighbours with the same block, together. @returns {Layer[][]} */
function runs(layers) {
  const found = [];
  for (const layer of layers) {
    const last = found[found.length - 1];
    if (layer.block && last?.[0].block === layer.block) last.push(layer);
    else found.push([layer]);
  }
  return found;
}

function contentOf({ shape }, labels) {
  if (shape.length === 3) return "maps";
  if (shape.length !== 1) return "nothing";
  return shape[0] === labels || (labels === 2 && shape[0] === 1) ? "labels" : "values";
}
