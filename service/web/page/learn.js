/** What each kind of layer does, in a few words. */

/**
 * @typedef {object} Lesson
 * @property {string} name what people call it
 * @property {string} text a sentence or three
 */

/** @type {Record<string, Lesson>} by ONNX operator */
const LESSONS = {
  Conv: {
    name: "Convolution",
    text: "A small window of learned weights, the kernel, slides over the maps before it. At each place it multiplies what it covers by its weights and adds everything up, with one more number, the bias. Where the picture resembles the kernel the sum is large. Each output map has kernels of its own: it looks for something of its own, such as an edge or, deeper in, the parts of things.",
  },
  ConvTranspose: {
    name: "Transposed convolution",
    text: "A convolution the other way around: each value is spread over a window of a larger map, weighted by the kernel, and what overlaps is added.",
  },
  Relu: {
    name: "ReLU",
    text: "Keeps what is positive and sets the rest to zero. Without such a bend any number of convolutions would be no more than one: a sum of sums is a sum.",
  },
  Clip: {
    name: "Clip",
    text: "Holds every value between a lowest and a highest one.",
  },
  LeakyRelu: {
    name: "Leaky ReLU",
    text: "Keeps what is positive, and lets through a small part of what is negative, so that no map falls silent altogether.",
  },
  PRelu: { name: "PReLU", text: "A leaky ReLU whose leak has been learned." },
  Gelu: {
    name: "GELU",
    text: "A softened ReLU: what is clearly positive passes, what is clearly negative is stopped, and around zero the one goes over into the other. Each value is weighted by the probability that a normal random number lies below it.",
  },
  Sigmoid: {
    name: "Sigmoid",
    text: "Bends any number into the range from 0 to 1: very negative becomes almost 0, zero becomes one half. As the last step it makes a probability of each logit by itself.",
  },
  HardSigmoid: {
    name: "Hard sigmoid",
    text: "A sigmoid made of three straight lines, because those are faster.",
  },
  HardSwish: {
    name: "Hard swish",
    text: "The value times a hard sigmoid of itself: zero far below, itself far above, with a dip between.",
  },
  Swish: {
    name: "SiLU",
    text: "The value times its own sigmoid: a smooth ReLU with a small dip below zero.",
  },
  Mish: {
    name: "Mish",
    text: "A smooth ReLU with a small dip below zero: the value times the hyperbolic tangent of its softplus.",
  },
  Tanh: { name: "Tanh", text: "Bends any number into the range from −1 to 1." },
  Elu: { name: "ELU", text: "Keeps what is positive; what is negative levels off smoothly." },
  Selu: {
    name: "SELU",
    text: "An ELU with two constants that keep the spread of the values the same from layer to layer.",
  },
  Softplus: {
    name: "Softplus",
    text: "A ReLU without its corner: the logarithm of one plus the exponential.",
  },
  Pow: {
    name: "Power",
    text: "Raises every value to a power. Squared before an average, strong values count for more than weak ones.",
  },
  Sqrt: { name: "Square root", text: "The square root of every value." },
  Exp: { name: "Exponential", text: "e to the power of every value." },
  Abs: { name: "Absolute value", text: "Every value without its sign." },
  Neg: { name: "Negation", text: "Every value with the other sign." },
  Erf: { name: "Error function", text: "The S-shaped curve from which a GELU is made." },
  MaxPool: {
    name: "Max pooling",
    text: "Slides a window over each map and keeps only the largest value. The map becomes smaller, and it matters less where exactly something was found.",
  },
  AveragePool: {
    name: "Average pooling",
    text: "Slides a window over each map and keeps the mean. The map becomes smaller and smoother.",
  },
  GlobalAveragePool: {
    name: "Global average",
    text: "The mean of a whole map: how much of what the map looks for there is in the photo, wherever it may be. This is why a class activation map is exact: what the linear layer adds up afterwards can be followed back to each place.",
  },
  GlobalMaxPool: {
    name: "Global maximum",
    text: "The largest value of a whole map: how strongly what the map looks for was found at the best place.",
  },
  BatchNormalization: {
    name: "Batch norm",
    text: "Shifts and stretches each map by four numbers of its own: mean and variance as they were in training, then a scale and a shift that were learned. It keeps the values in a range where learning works.",
  },
  LayerNormalization: {
    name: "Layer norm",
    text: "Shifts and stretches the values of each position so that their mean is 0 and their spread 1; then scale and shift are learned.",
  },
  InstanceNormalization: {
    name: "Instance norm",
    text: "Shifts and stretches each map of each photo so that its mean is 0 and its spread 1.",
  },
  LRN: {
    name: "Local response norm",
    text: "Divides each value by how active its neighbouring maps are at the same place.",
  },
  Add: {
    name: "Addition",
    text: "Adds two sets of maps, place by place. Mostly it brings together what a block has made and what went around it: the block then only has to learn a correction, and deep networks can be trained (a residual connection).",
  },
  Sub: { name: "Subtraction", text: "The difference of two values, place by place." },
  Mul: {
    name: "Multiplication",
    text: "Multiplies place by place. Where one side is a single number for each map, it turns that map up or down.",
  },
  Div: { name: "Division", text: "Divides every value by the same number." },
  Concat: {
    name: "Joining",
    text: "Puts sets of maps one behind the other. Nothing is computed: each map goes on as it is.",
  },
  Flatten: {
    name: "Flatten",
    text: "Writes all maps as one long row of numbers, row by row and map by map, for the linear layer behind it. Nothing is computed.",
  },
  Gemm: {
    name: "Linear layer",
    text: "Each output has a learned weight for every input: input times weight, all added up, and a bias. The last one gives a score to each label, its logit: the larger, the more the network is for it.",
  },
  Softmax: {
    name: "Softmax",
    text: "Makes probabilities of the logits: each becomes e to its power, divided by the sum of all of them. They are positive and add up to 1; a lead in logits becomes a multiple in probability.",
  },
  Resize: { name: "Resize", text: "Makes maps larger or smaller by interpolating between their values." },
  Pad: { name: "Padding", text: "Lays a border around each map." },
};
LESSONS.ReduceMax = LESSONS.GlobalMaxPool;
LESSONS.ReduceMean = LESSONS.GlobalAveragePool;
LESSONS.MatMul = LESSONS.Gemm;
LESSONS.Silu = LESSONS.Swish;
LESSONS.Sum = LESSONS.Add;

const DEPTHWISE = {
  name: "Depthwise convolution",
  text: "A convolution in which each map is made of one map before it alone: as many groups as maps. It finds patterns at neighbouring places; the convolution of 1 × 1 that mostly follows mixes the maps. Together they need far fewer products than a convolution that does both.",
};

const RELU6 = {
  name: "ReLU6",
  text: "A ReLU that ends at 6: what is negative becomes zero, and what is above 6 becomes 6. Numbers in so small a range can be stored in few bits, which networks for phones make use of.",
};

const TEMPERATURE = {
  name: "Temperature",
  text: "Divides all logits by one number, which was fitted on images that the network had not seen. The order of the labels stays the same; the probabilities become honest: of a hundred answers given with 80 %, about eighty are right.",
};

const AT_EACH_PLACE = {
  name: "Linear layer",
  text: "The same weights at every place: each map that it makes is a weighted sum of all maps before it, and a bias. A convolution whose window is a single pixel.",
};

const ATTENTION = {
  name: "Attention",
  text: "Multiplies two sets of numbers that both come from the photo; nothing here is learned. First every place is compared with every other one; a softmax makes shares of the results; then each place takes from all others by these shares. So a transformer brings together what is far apart.",
};

const SHARES = {
  name: "Softmax",
  text: "Makes shares of numbers: positive, and 1 all together. Here they say how much each place heeds every other one.",
};

/** @param {import("./api.js").Layer} layer @returns {Lesson} */
export function lesson(layer) {
  return special(layer) ?? LESSONS[layer.kind] ?? unknown(layer);
}

/** What a kind means where it stands. @returns {Lesson | null} */
function special({ kind, shape, weights, attributes, groups, constants }) {
  if (kind === "Input") return { name: "Input", text: inputLesson(attributes) };
  if (kind === "Conv" && groups > 1 && groups === shape[0]) return DEPTHWISE;
  if (kind === "Clip" && constants.min === 0 && constants.max === 6) return RELU6;
  if (kind === "Div" && shape.length === 1) return TEMPERATURE;
  if (kind === "Softmax" && shape.length !== 1) return SHARES;
  if (kind === "MatMul" && !weights.includes("weight")) return ATTENTION;
  if ((kind === "MatMul" || kind === "Gemm") && shape.length !== 1) return AT_EACH_PLACE;
  return null;
}

/** What the network reads: its colours, and their range as the graph makes it of black, of white and of pure colours. */
function inputLesson({ channels, lowest, highest }) {
  const maps = channels?.length > 1 ? `one map each for ${listed(channels)}` : "one map of brightness";
  const beginning = channels
    ? `The photo as numbers: ${maps}.`
    : "The photo as numbers, as the network's first layer reads them.";
  if (lowest === undefined) return beginning;
  const short = (value) => String(Number(value.toPrecision(3))).replace("-", "−");
  const range = `from ${short(lowest)} to ${short(highest)}`;
  return lowest < 0
    ? `${beginning} The network's own first steps have shifted and stretched the colours so that they lie around zero, ${range}; blue is below, orange above.`
    : `${beginning} They are not shifted to lie around zero: they go ${range}, and the deeper the orange, the more there is of a colour.`;
}

/** "red, green and blue" */
function listed(words) {
  return words.join(", ").replace(/, ([^,]*)$/, " and $1");
}

function unknown(layer) {
  return {
    name: layer.kind,
    text: "A step that this page has no picture of its arithmetic for; its values are shown as they are.",
  };
}

export const WELCOME =
  "From left to right, each column is a layer, and each square one of its maps: what that layer makes of the photo. Point at a map to see what it is made of, and which part of the photo a pixel of it can see. Click it for its arithmetic, with the real numbers.";
