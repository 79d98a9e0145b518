/** Links from a calculation to the maps that it is made of, each with a small picture of its map. */

import { make } from "./dom.js";
import { mapName } from "./names.js";
import { operand } from "./operands.js";
import { hasPlaces, originOf } from "./origin.js";
import { paint } from "./paint.js";

/** @typedef {{row: number, column: number}} Spot a pixel of a map */

/**
 * A link to a map, or to a value. The picture of a value is that of the map that it was made of.
 * @param {import("./detail.js").Context} context
 * @param {import("./api.js").Layer} layer
 * @param {number} index of the map, or of the value
 * @param {object} [options]
 * @param {string} [options.text]
 * @param {import("./operands.js").Operand} [options.own] the map itself, where it is known already
 * @param {() => Spot | undefined} [options.spot] the pixel to work out there
 */
export function mapLink(context, layer, index, { text = nameOf(layer, index), own, spot } = {}) {
  const { description, tensors, visit } = context;
  const origin = originOf(description.layers, layer, index);
  const picture = origin && make("canvas", { class: "pixels", "aria-hidden": "true" });
  if (picture) show(picture, own ?? operand(tensors, origin.layer, origin.index));
  return make(
    "button",
    {
      type: "button",
      class: "maplink",
      title: `Open ${text} of ${layer.name}`,
      data: { tensor: layer.tensor, index },
      on: { click: () => visit(layer, index, spot?.()) },
    },
    picture,
    text,
  );
}

/**
 * A link to the map that a value was made of, at the value's own place; or to the value, where it is made of several maps.
 * @param {import("./detail.js").Context} context
 */
export function originLink(context, layer, index, text) {
  const origin = originOf(context.description.layers, layer, index);
  if (!origin) return mapLink(context, layer, index, { text });
  return mapLink(context, origin.layer, origin.index, { text, spot: () => origin.place ?? undefined });
}

/** A link with words before it. @param {string} words @param {Node} link */
export function titled(words, link) {
  return make("span", {}, words, link);
}

function nameOf(layer, index) {
  return hasPlaces(layer) ? mapName(layer, index) : `value ${index + 1}`;
}

/** @param {HTMLCanvasElement} picture @param {import("./operands.js").Operand | Promise<import("./operands.js").Operand>} map */
async function show(picture, map) {
  try {
    const { values, size, scale } = await map;
    paint(picture, values, ...size, scale);
  } catch {
    picture.remove(); // the link leads there nevertheless, where the error is said
  }
}
