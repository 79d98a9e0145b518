/** The wheel moves the network sideways, and leaves the page alone where the page is what moves. */

/** While the page has moved within so many milliseconds, the wheel goes on to move it. */
const STILL = 250;
/** Pixels of a line, for browsers that count the wheel in lines. */
const LINE = 16;

/**
 * Let the wheel scroll a place sideways, from end to end; at an end it moves the page. A page that is moving goes on, and
 * one that shows only a part of the place shows the rest of it first.
 * @param {HTMLElement} place @param {AbortSignal} signal ends it
 */
export function scrollByWheel(place, signal) {
  let moved = -Infinity;
  document.addEventListener("scroll", ({ timeStamp }) => (moved = timeStamp), { passive: true, signal });
  place.addEventListener(
    "wheel",
    (event) => {
      const { deltaX, deltaY, deltaMode, timeStamp } = event;
      const isSideways = event.shiftKey || Math.abs(deltaX) >= Math.abs(deltaY);
      if (event.ctrlKey || isSideways || timeStamp - moved < STILL) return;
      if (isCut(place, deltaY) || isAtEnd(place, deltaY)) return;
      event.preventDefault();
      const unit = [1, LINE, place.clientWidth][deltaMode];
      place.scrollBy({ left: deltaY * unit, behavior: "instant" });
    },
    { passive: false, signal },
  );
}

/** Whether the page can show more of the place in this direction. */
function isCut(place, down) {
  const { top, bottom } = place.getBoundingClientRect();
  return down > 0 ? bottom > window.innerHeight + 1 : top < -1;
}

function isAtEnd({ scrollLeft, scrollWidth, clientWidth }, right) {
  return right > 0 ? scrollLeft >= scrollWidth - clientWidth - 1 : scrollLeft <= 0;
}
