/** Which maps of a source a map is made of. */

/** Kinds whose every output is made of all inputs. */
const WHOLE = new Set([
  "Gemm",
  "MatMul",
  "Softmax",
  "LogSoftmax",
  "ConvTranspose",
  "LRN",
  "LayerNormalization",
  "Einsum",
]);

/**
 * The first and the last map (inclusive) of `source` that map `index` of `layer` reads; null if none.
 * @param {import("./api.js").Layer} layer
 * @param {number} index
 * @param {import("./api.js").Layer} source
 * @param {import("./api.js").Layer[]} sources all of the layer's, in order
 * @returns {[number, number] | null}
 */
export function linked(layer, index, source, sources) {
  const maps = source.shape[0];
  if (layer.kind === "Conv") return groupOf(layer, index, maps);
  if (layer.kind === "Concat") return partOf(index, source, sources);
  if (WHOLE.has(layer.kind)) return [0, maps - 1];
  if (layer.shape[0] === maps) return [index, index];
  if (maps === 1) return [0, 0];
  if (layer.order) return mapOf(placeOf(layer.order, index, source.shape).map);
  return [0, maps - 1];
}

/** A convolution's outputs are shared out among its groups, and so are its inputs. */
export function groupOf(layer, index, maps) {
  const inputs = maps / layer.groups;
  const group = Math.floor(index / (layer.shape[0] / layer.groups));
  return [group * inputs, (group + 1) * inputs - 1];
}

/** Concatenated maps keep their order: each is a copy of one. */
function partOf(index, source, sources) {
  const before = sources.slice(0, sources.indexOf(source)).reduce((sum, one) => sum + one.shape[0], 0);
  const at = index - before;
  return at >= 0 && at < source.shape[0] ? [at, at] : null;
}

function mapOf(map) {
  return [map, map];
}

/**
 * Where a value of a flattened row comes from.
 * @param {"CHW" | "HWC"} order in which the maps were written
 * @param {number} index of the value
 * @param {number[]} shape of the maps: (maps, height, width)
 */
export function placeOf(order, index, [maps, height, width]) {
  const sizes = { C: maps, H: height, W: width };
  const at = {};
  let rest = index;
  for (const axis of [...order].reverse()) {
    at[axis] = rest % sizes[axis];
    rest = Math.floor(rest / sizes[axis]);
  }
  return { map: at.C, row: at.H, column: at.W };
}
