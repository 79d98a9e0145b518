/** Which pixel of a map is worked out: pointed at, held by a click, walked to by keys, or played through. */

import { make, say } from "./dom.js";
import { MapView } from "./mapview.js";
import { figure } from "./numbers.js";

/** Milliseconds from one pixel to the next. */
const PACE = matchMedia("(prefers-reduced-motion: reduce)").matches ? 800 : 160;

/**
 * A view of the map that the layer made, and what goes with it.
 * @param {import("./detail.js").Context} context
 * @param {ConstructorParameters<typeof MapView>[0]} view
 * @param {(row: number, column: number, playing: boolean) => void} show called for every pixel that is chosen
 * @returns {HTMLElement}
 */
export function chooser(context, view, show) {
  const { layer, point, spot } = context;
  let held = false;
  let timer = 0;

  const map = new MapView({ ...view, pick });
  const place = make("span", { class: "soft place" });
  const play = make(
    "button",
    {
      type: "button",
      class: "toggle",
      "aria-pressed": "false",
      on: { click: () => (timer ? stop() : start()) },
    },
    "▶ Play",
  );

  function choose(row, column) {
    Object.assign(spot, { row, column });
    map.mark(row, column);
    place.textContent = `row ${row}, column ${column}${held ? ", held" : ""}`;
    show(row, column, timer !== 0);
    point(layer, row, column);
  }

  function pick(row, column, how) {
    if (how === "over" && (held || timer)) return;
    if (how !== "over") stop();
    if (how === "click") held = !held || row !== spot.row || column !== spot.column;
    choose(row, column);
    if (how === "key") say(`${place.textContent}: ${figure(view.values[row * map.width + column])}`);
  }

  function start() {
    timer = window.setInterval(next, PACE);
    play.setAttribute("aria-pressed", "true");
    play.textContent = "■ Stop";
  }

  function stop() {
    window.clearInterval(timer);
    timer = 0;
    play.setAttribute("aria-pressed", "false");
    play.textContent = "▶ Play";
  }

  function next() {
    if (!map.element.isConnected) return stop();
    const after = spot.row * map.width + spot.column + 1;
    const at = after % (map.height * map.width);
    return choose(Math.floor(at / map.width), at % map.width);
  }

  Object.assign(spot, {
    row: Math.min(spot.row, map.height - 1),
    column: Math.min(spot.column, map.width - 1),
  });
  queueMicrotask(() => choose(spot.row, spot.column)); // when `show` has all that it needs
  return make("div", { class: "chooser" }, map.element, make("div", { class: "player" }, play, place));
}
