/** The softmax: exponentials, and each one's share of their sum. */

import { make } from "../dom.js";
import { mapLink } from "../maplink.js";
import { figure, percent, whole } from "../numbers.js";
import { formula, line, result, sign, summand } from "../parts.js";
import { leading, ranking } from "./ranking.js";

/** @param {import("../detail.js").Context} context */
export async function softmax(context) {
  const { description, layer, index, sources, tensors } = context;
  const [given, made] = await Promise.all([tensors.maps(sources[0].tensor), tensors.maps(layer.tensor)]);
  const highest = given.values.reduce((one, other) => Math.max(one, other));
  const powers = Array.from(given.values, (value) => Math.exp(value - highest));
  const sum = powers.reduce((total, power) => total + power, 0);
  const name = (at) =>
    description.labels.length === powers.length ? description.labels[at] : `value ${at + 1}`;
  const shown = leading(powers, index);
  const rest = powers.length - shown.length;
  const others = sum - shown.reduce((total, at) => total + powers[at], 0);
  const lines = [
    ...shown.map((at) => ({
      name: name(at),
      link: mapLink(context, sources[0], at, { text: name(at) }),
      numbers: [given.values[at], powers[at], powers[at] / sum],
      kind: at === index ? "term chosen" : "term",
    })),
    ...(rest
      ? [{ name: `the other ${whole(rest)}`, numbers: [null, others, others / sum], kind: "rest" }]
      : []),
  ];
  return [
    formula("yᵢ = ", power("xᵢ − m"), " / Σ ", power("xⱼ − m"), ", where m is the largest x"),
    share(name(index), powers[index], sum, made.values[index]),
    make(
      "p",
      { class: "soft" },
      "Taking away the largest changes nothing in the end, and keeps the powers from becoming too large to write.",
    ),
    ranking("Exponentials and shares", ["", "x", power("x − m"), "share"], lines),
  ];
}

/** e to the power of something. */
function power(exponent) {
  return make("span", {}, "e", make("sup", {}, exponent));
}

function share(name, own, sum, shown) {
  const value = own / sum;
  return line(
    value,
    shown,
    summand({ name, value: own }),
    sign("/"),
    summand({ name: "all together", value: sum }),
    result(value, "its probability", "=", `${figure(value)} = ${percent(value)}`),
  );
}
