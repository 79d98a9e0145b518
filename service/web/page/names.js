/** What maps are called. */

/**
 * The colour that a map of the input shows, or else its number.
 * @param {import("./api.js").Layer} layer
 * @param {number} index of the map
 */
export function mapName(layer, index) {
  return colourName(layer, index) ?? `map ${index + 1}`;
}

/** The colour that a map of the input shows; null for other maps. @returns {string | null} */
export function colourName({ kind, attributes }, index) {
  return kind === "Input" ? (attributes.channels?.[index] ?? null) : null;
}

/** Kinds of activations that leave large values as they are, or nearly so. */
export const RECTIFIERS = [
  "Relu",
  "LeakyRelu",
  "PRelu",
  "Clip",
  "Elu",
  "Selu",
  "Gelu",
  "Silu",
  "Swish",
  "HardSwish",
  "Mish",
];

/** Kinds of activations, which belong to the layer before them. A softmax is none. */
export const ACTIVATIONS = new Set([...RECTIFIERS, "Tanh"]);
