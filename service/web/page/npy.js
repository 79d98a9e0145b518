/** NumPy's file format 1.0, for the one kind of array that the service sends. */

/**
 * @typedef {object} NumberArray
 * @property {number[]} shape
 * @property {Float32Array} values in C order: the last axis runs fastest
 */

/**
 * Read little-endian float32 in C order.
 * @param {ArrayBuffer} buffer
 * @returns {NumberArray}
 */
export function readNpy(buffer) {
  const bytes = new DataView(buffer);
  const magic = String.fromCharCode(...new Uint8Array(buffer, 1, 5));
  if (magic !== "NUMPY") throw new TypeError("not an array in NumPy's format");
  const start = 10 + bytes.getUint16(8, true);
  const header = new TextDecoder("latin1").decode(new Uint8Array(buffer, 10, start - 10));
  if (!header.includes("'<f4'") || !header.includes("'fortran_order': False")) {
    throw new TypeError(`an array of another kind: ${header}`);
  }
  const shape = header
    .match(/'shape': \(([^)]*)\)/)[1]
    .split(",")
    .filter((size) => size.trim())
    .map(Number);
  const count = shape.reduce((product, size) => product * size, 1);
  const aligned = start % 4 ? buffer.slice(start) : buffer;
  return { shape, values: new Float32Array(aligned, start % 4 ? 0 : start, count) };
}
