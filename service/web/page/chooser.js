/** Which pixel of a map is worked out: pointed at, held by a click, walked to by keys, or the newest one while the map grows. */

import { loadStyles, make, say } from "./dom.js";
import { MapView } from "./mapview.js";
import { figure } from "./numbers.js";

/** What lets the map grow: it is loaded when a map is opened for the first time. @type {Promise<typeof import("./growth/growth.js").Growth> | null} */
let growing = null;

/**
 * A view of the map that the layer made, and what goes with it.
 * @param {import("./detail.js").Context} context
 * @param {ConstructorParameters<typeof MapView>[0]} view
 * @param {(row: number, column: number, growing: boolean) => void} show called for every pixel that is chosen
 * @returns {HTMLElement}
 */
export function chooser(context, view, show) {
  const { layer, point, spot } = context;
  let held = false;
  /** @type {import("./growth/growth.js").Growth | null} */
  let growth = null;

  const map = new MapView({ ...view, pick, grows: true });
  const place = make("span", { class: "soft place" });
  const player = make("div", { class: "player" }, place);

  function choose(row, column) {
    Object.assign(spot, { row, column });
    map.mark(row, column);
    place.textContent = `row ${row}, column ${column}${held ? ", held" : ""}`;
    show(row, column, growth?.isGrowing ?? false);
    point(layer, row, column);
  }

  function pick(row, column, how) {
    if (how === "over" && (held || growth?.isGrowing)) return;
    growth?.end();
    if (how === "click") held = !held || row !== spot.row || column !== spot.column;
    choose(row, column);
    if (how === "key") say(`${place.textContent}: ${figure(view.values[row * map.width + column])}`);
  }

  /** Let the map grow from where nothing is held. */
  function grow(row, column) {
    held = false;
    choose(row, column);
  }

  async function addPlayer() {
    growing ??= loadGrowth();
    const Growth = await growing;
    growth = new Growth(map, view.values, grow);
    player.prepend(growth.element);
  }

  Object.assign(spot, {
    row: Math.min(spot.row, map.height - 1),
    column: Math.min(spot.column, map.width - 1),
  });
  queueMicrotask(() => choose(spot.row, spot.column)); // when `show` has all that it needs
  if (map.height * map.width > 1) addPlayer().catch(() => (growing = null)); // then the map does not grow
  return make("div", { class: "chooser" }, map.element, player);
}

async function loadGrowth() {
  const [{ Growth }] = await Promise.all([import("./growth/growth.js"), loadStyles(new URL("growth/growth.css", import.meta.url))]);
  return Growth;
}
