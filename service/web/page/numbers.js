/** Numbers as people read them. */

/** A probability as a percentage with one digit; what is not quite 0 or 1 does not look like it. */
export function percent(probability) {
  if (probability > 0.9995 && probability < 1) return ">99.9%";
  if (probability > 0 && probability < 0.0005) return "<0.1%";
  return `${(100 * probability).toFixed(1)}%`;
}

/** Any number with `digits` digits and a true minus sign; only zero looks like zero. */
export function figure(value, digits = 4) {
  if (!Number.isFinite(value)) return value > 0 ? "∞" : value < 0 ? "−∞" : "not a number";
  const size = Math.abs(value);
  if (size === 0) return "0";
  const isRound = size < 1e5 && size >= 10 ** -Math.min(4, digits); // fewer places would show zeros only
  const text = isRound ? fixed(value, digits) : exponential(value, digits - 2);
  return text.replace("-", "−");
}

/** Any number in the few signs that a small cell has room for. */
export function brief(value) {
  const size = Math.abs(value);
  if (size >= 0.01 || Number.isNaN(value)) return figure(value, 2);
  return size < 0.0005 ? "0.00" : value.toFixed(3).replace("-", "−");
}

function fixed(value, digits) {
  const whole = Math.max(1, Math.floor(Math.log10(Math.abs(value) || 1)) + 1);
  const text = value.toFixed(Math.max(0, Math.min(digits, digits - whole + (Math.abs(value) < 1 ? 1 : 0))));
  return Number(text) === 0 ? text.replace("-", "") : text;
}

function exponential(value, digits) {
  const [factor, power] = value.toExponential(Math.max(1, digits)).split("e");
  return `${factor}·10${raised(Number(power))}`;
}

function raised(power) {
  return [...String(power)].map((sign) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(sign)]).join("");
}

/** Milliseconds, in words that fit a legend. */
export function milliseconds(value) {
  return value >= 1000 ? `${(value / 1000).toFixed(2)} s` : `${value.toFixed(value < 10 ? 1 : 0)} ms`;
}

/** A whole number with its thousands apart. */
export function whole(value) {
  return value.toLocaleString("en");
}

/** "1 map", "2 maps". */
export function counted(count, noun) {
  return `${whole(count)} ${noun}${count === 1 ? "" : "s"}`;
}
