/** Functions that are applied to each value by itself: as a formula, and to compute with. */

/** @typedef {{formula: string, of: (x: number) => number}} Function */

/** @type {Record<string, (layer: import("../api.js").Layer) => Function | null>} by ONNX operator */
const FUNCTIONS = {
  Relu: () => ({ formula: "y = max(0, x)", of: (x) => Math.max(0, x) }),
  Clip: ({ constants: { min = -Infinity, max = Infinity } }) => ({
    formula: max === Infinity ? `y = max(${min}, x)` : `y = min(${max}, max(${min}, x))`,
    of: (x) => Math.min(max, Math.max(min, x)),
  }),
  LeakyRelu: ({ attributes: { alpha = 0.01 } }) => ({
    formula: `y = x where x > 0, else ${short(alpha)} · x`,
    of: (x) => (x > 0 ? x : alpha * x),
  }),
  Gelu: ({ attributes: { approximate = "none" } }) =>
    approximate === "tanh"
      ? { formula: "y = x / 2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))", of: geluByTanh }
      : {
          formula: "y = x · Φ(x) = x / 2 · (1 + erf(x / √2))",
          of: (x) => (x / 2) * (1 + erf(x / Math.SQRT2)),
        },
  Sigmoid: () => ({ formula: "y = 1 / (1 + e⁻ˣ)", of: sigmoid }),
  HardSigmoid: ({ attributes: { alpha = 0.2, beta = 0.5 } }) => ({
    formula: `y = min(1, max(0, ${short(alpha)} · x + ${short(beta)}))`,
    of: (x) => Math.min(1, Math.max(0, alpha * x + beta)),
  }),
  HardSwish: () => ({
    formula: "y = x · min(1, max(0, x / 6 + ½))",
    of: (x) => x * Math.min(1, Math.max(0, x / 6 + 0.5)),
  }),
  Silu: () => ({ formula: "y = x / (1 + e⁻ˣ)", of: (x) => x * sigmoid(x) }),
  Mish: () => ({ formula: "y = x · tanh(ln(1 + eˣ))", of: (x) => x * Math.tanh(softplus(x)) }),
  Tanh: () => ({ formula: "y = tanh(x)", of: Math.tanh }),
  Elu: ({ attributes: { alpha = 1 } }) => ({
    formula: `y = x where x > 0, else ${short(alpha)} · (eˣ − 1)`,
    of: (x) => (x > 0 ? x : alpha * Math.expm1(x)),
  }),
  Selu: ({ attributes: { alpha = 1.6732632, gamma = 1.050701 } }) => ({
    formula: `y = ${short(gamma)} · (x where x > 0, else ${short(alpha)} · (eˣ − 1))`,
    of: (x) => gamma * (x > 0 ? x : alpha * Math.expm1(x)),
  }),
  Softplus: () => ({ formula: "y = ln(1 + eˣ)", of: softplus }),
  Erf: () => ({ formula: "y = erf(x)", of: erf }),
  Exp: () => ({ formula: "y = eˣ", of: Math.exp }),
  Log: () => ({ formula: "y = ln(x)", of: Math.log }),
  Sqrt: () => ({ formula: "y = √x", of: Math.sqrt }),
  Abs: () => ({ formula: "y = |x|", of: Math.abs }),
  Neg: () => ({ formula: "y = −x", of: (x) => -x }),
  Reciprocal: () => ({ formula: "y = 1 / x", of: (x) => 1 / x }),
  Pow: withConstant("^", (x, y) => x ** y),
  Add: withConstant("+", (x, y) => x + y),
  Sub: withConstant("−", (x, y) => x - y),
  Mul: withConstant("·", (x, y) => x * y),
  Div: withConstant("/", (x, y) => x / y),
};
FUNCTIONS.Swish = FUNCTIONS.Silu;

/** What a layer does to each value; null where it is not known, or needs more than the value. */
export function functionOf(layer) {
  return FUNCTIONS[layer.kind]?.(layer) ?? null;
}

/** An operation of which one side is the same number for all values. */
function withConstant(sign, operation) {
  return ({ constants: { left, right } }) => {
    if (right !== undefined)
      return { formula: `y = x ${sign} ${short(right)}`, of: (x) => operation(x, right) };
    if (left !== undefined) return { formula: `y = ${short(left)} ${sign} x`, of: (x) => operation(left, x) };
    return null;
  };
}

function short(value) {
  return String(Number(value.toPrecision(6))).replace("-", "−");
}

function sigmoid(x) {
  return 1 / (1 + Math.exp(-x));
}

function softplus(x) {
  return Math.max(0, x) + Math.log1p(Math.exp(-Math.abs(x)));
}

function geluByTanh(x) {
  return (x / 2) * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));
}

/**
 * The error function, to about 1e-15: its series near zero, and the continued fraction of erfc beyond
 * (Abramowitz and Stegun, 1964, 7.1.6 and 7.1.14).
 */
export function erf(x) {
  const size = Math.abs(x);
  if (size > 6) return Math.sign(x);
  return Math.sign(x) * (size < 2.5 ? series(size) : 1 - fraction(size));
}

function series(x) {
  let term = x;
  let sum = x;
  for (let n = 1; term > sum * 1e-17 && n < 200; n += 1) {
    term *= (2 * x * x) / (2 * n + 1);
    sum += term;
  }
  return ((2 * Math.exp(-x * x)) / Math.sqrt(Math.PI)) * sum;
}

function fraction(x) {
  let below = x;
  for (let n = 60; n > 0; n -= 1) below = x + n / 2 / below;
  return Math.exp(-x * x) / Math.sqrt(Math.PI) / below;
}
