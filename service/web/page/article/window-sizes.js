/** Where a sliding window comes to lie, along one axis. All numbers are pixels of the input, or places of the output. */

/**
 * @typedef {object} Settings
 * @property {number} size side of the input
 * @property {number} kernel
 * @property {number} stride
 * @property {number} padding on each side
 * @property {number} dilation distance between the window's cells
 */

/** From the window's first to its last cell. @param {Settings} settings */
export function extent({ kernel, dilation }) {
  return dilation * (kernel - 1) + 1;
}

/** Places of the output; 0 where the window does not fit. @param {Settings} settings */
export function outputSize(settings) {
  const room = settings.size + 2 * settings.padding - extent(settings);
  return room < 0 ? 0 : Math.floor(room / settings.stride) + 1;
}

/** What place `at` of the output reads; below 0 and from the input's size on is padding. @param {Settings} settings */
export function readBy(at, { kernel, stride, padding, dilation }) {
  return Array.from({ length: kernel }, (_, cell) => at * stride - padding + cell * dilation);
}

/** The places of the output that read `pixel`. @param {Settings} settings */
export function readersOf(pixel, settings) {
  return Array.from({ length: outputSize(settings) }, (_, at) => at).filter((at) =>
    readBy(at, settings).includes(pixel),
  );
}

/** Pixels of the input that no place reads. @param {Settings} settings */
export function unread(settings) {
  return Array.from({ length: settings.size }, (_, pixel) => pixel).filter(
    (pixel) => !readersOf(pixel, settings).length,
  );
}
