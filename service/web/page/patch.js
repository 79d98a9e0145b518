/** Patches of a photo: the part that a place of a map sees. */

import { onPhoto, receptiveField } from "./field.js";

/** The longest side of a patch, pixels. */
const SIDE = 192;
/** Receptive fields up to this share of the input are shown whole; of larger ones the middle, which counts most. */
const WHOLE = 0.25;
/** The side of such a middle: the distance of so many places of the map, but at most this share of the input. */
const PLACES = 3;
const LARGEST = 0.5;

/**
 * The part of the input that a place of a map mostly sees.
 * @param {import("./api.js").Layer} layer
 * @param {{row: number, column: number}} place
 * @param {{height: number, width: number}} input
 * @returns {import("./field.js").Region}
 */
export function regionOf(layer, { row, column }, input) {
  const field = receptiveField(layer.field, row, column, input);
  const share = ((field.bottom - field.top) * (field.right - field.left)) / (input.height * input.width);
  if (share <= WHOLE) return field;
  const [, rows, columns] = layer.shape;
  const [top, bottom] = middle(layer.field?.rows, row, rows, input.height);
  const [left, right] = middle(layer.field?.columns, column, columns, input.width);
  return { top, left, bottom, right };
}

/** @param {[number, number, number] | undefined} span @param {number} at @param {number} count of places @param {number} size of the input */
function middle(span, at, count, size) {
  const step = span ? span[0] : size / count;
  const centre = span ? span[0] * at + (span[1] + span[2] + 1) / 2 : (at + 0.5) * step;
  const half = Math.max(step, Math.min(PLACES * step, LARGEST * size)) / 2;
  return [Math.max(0, centre - half), Math.min(size, centre + half)];
}

/**
 * Cuts patches out of a photo; out of the exact input where browsers cannot show the photo (TIFF).
 * @param {import("./gallery.js").Photo} photo
 * @param {import("./api.js").Saw} saw
 * @returns {Promise<(canvas: HTMLCanvasElement, region: import("./field.js").Region) => void>}
 */
export async function cutter(photo, saw) {
  const image = await load(photo.url);
  if (image) return (canvas, region) => draw(canvas, image, onPhoto(region, saw, saw.box));
  const input = await load(`data:image/png;base64,${saw.png}`);
  return (canvas, { left, top, right, bottom }) => draw(canvas, input, [left, top, right, bottom]);
}

async function load(url) {
  const image = new Image();
  image.src = url;
  try {
    await image.decode();
    return image;
  } catch {
    return null;
  }
}

/** @param {import("./frame.js").Box} box */
function draw(canvas, image, [left, top, right, bottom]) {
  const [x, y] = [Math.max(0, left), Math.max(0, top)];
  const width = Math.max(1, Math.min(image.naturalWidth, right) - x);
  const height = Math.max(1, Math.min(image.naturalHeight, bottom) - y);
  const scale = SIDE / Math.max(width, height);
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const brush = canvas.getContext("2d");
  brush.imageSmoothingEnabled = scale < 8; // pixels of a small photo stay pixels
  brush.fillStyle = "#fff"; // what is transparent is white for the model
  brush.fillRect(0, 0, canvas.width, canvas.height);
  brush.drawImage(image, x, y, width, height, 0, 0, canvas.width, canvas.height);
}
