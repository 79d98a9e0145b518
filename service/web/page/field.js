/** Receptive fields: which pixels of the input, and of the photo, a value can see. */

/** @typedef {{top: number, left: number, bottom: number, right: number}} Region pixels; bottom and right are beyond it */

/**
 * What the value at (row, column) of a map sees of the input.
 * @param {import("./api.js").Layer["field"]} field null: the whole input
 * @param {{height: number, width: number}} input
 * @returns {Region}
 */
export function receptiveField(field, row, column, input) {
  if (!field) return { top: 0, left: 0, bottom: input.height, right: input.width };
  const [top, bottom] = span(field.rows, row, input.height);
  const [left, right] = span(field.columns, column, input.width);
  return { top, left, bottom, right };
}

function span([jump, low, high], at, size) {
  const inside = (value) => Math.max(0, Math.min(size, value));
  return [inside(jump * at + low), inside(jump * at + high + 1)];
}

/**
 * The same region of the photo.
 * @param {Region} region
 * @param {{height: number, width: number}} input
 * @param {import("./frame.js").Box} box what the input covers of the photo
 * @returns {import("./frame.js").Box}
 */
export function onPhoto(region, input, [left, top, right, bottom]) {
  const across = (right - left) / input.width;
  const down = (bottom - top) / input.height;
  return [
    left + region.left * across,
    top + region.top * down,
    left + region.right * across,
    top + region.bottom * down,
  ];
}
