/** The article's words: one entry for each section. */

/** Kinds that bend each value by itself. */
const BENDS = [
  "Relu",
  "Gelu",
  "Silu",
  "Swish",
  "Clip",
  "LeakyRelu",
  "PRelu",
  "Elu",
  "HardSwish",
  "Mish",
  "Selu",
];
const POOLS = ["MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean", "GlobalMaxPool"];

/** @typedef {import("../api.js").Layer} Layer */
/**
 * @typedef {object} Section
 * @property {string} id its address is "#learn-" and this
 * @property {string} title
 * @property {string[]} text paragraphs
 * @property {(layers: Layer[]) => Layer | undefined} [layer] the layer that the section is about
 * @property {string} [live] what its link into the network says
 * @property {string} [caption] of its picture; none: it has no picture
 */

/** The first layer of any of these kinds. @param {string[]} kinds */
const first = (kinds) => (/** @type {Layer[]} */ layers) => layers.find(({ kind }) => kinds.includes(kind));
/** The last layer of any of these kinds that works on a vector. @param {string[]} kinds */
const last = (kinds) => (/** @type {Layer[]} */ layers) =>
  layers.findLast(({ kind, shape }) => kinds.includes(kind) && shape.length === 1);

/** @type {Section[]} */
export const SECTIONS = [
  {
    id: "image",
    title: "An image is a block of numbers",
    text: [
      "A colour photo is three grids of numbers, one each for red, green and blue. A number says how bright that colour is at that place, from 0 (dark) to 255 (full). The network sees these numbers and nothing else: no edges, no objects, and no name of the file.",
      "A network takes an input of one size. So the photo is first resized, and often cropped. What is lost here is lost for good: a face that is four pixels wide in the input is four pixels wide for every layer that follows.",
      "Most networks then shift and stretch the numbers so that they lie around zero, which makes training easier. That is why the first column of the network shows positive and negative values.",
    ],
    layer: (layers) => layers[0],
    live: "See the input in the network",
    caption: "The exact input of the model, and the numbers of the marked pixels.",
  },
  {
    id: "convolution",
    title: "Convolution: one small pattern, tried everywhere",
    text: [
      "A convolution has a small grid of weights, the kernel. The kernel is laid over a corner of the input, each weight is multiplied by the number below it, and all products are added up. One more learned number, the bias, is added to the sum. Then the kernel moves on by one step and the same is done again. The sums form a new grid, a feature map.",
      "The sum is large where the input resembles the kernel, and near zero where it does not. So a map answers one question at every place: is my pattern here? A layer has many kernels and makes one map with each.",
      "The same few weights are used at every place. This has two effects. There is little to learn: a 3 × 3 kernel over 3 maps has 27 weights, whatever the size of the photo. And a pattern that was learned in one corner is found in all others.",
    ],
    layer: (layers) => layers.find(({ kind, kernel }) => kind === "Conv" && kernel?.some((side) => side > 1)),
    live: "See it, and let its map grow",
    caption: "Four kernels of the model's first convolution, and the maps that they make of the photo.",
  },
  {
    id: "window",
    title: "Kernel, stride, padding, dilation: try them",
    text: [
      "Five numbers decide how large the output is and what each of its places sees. The kernel size is the side of the window. The stride is the step from one place to the next: a stride of 2 halves the output. Padding lays a border of zeros around the input, so that the window may reach over the edge. Dilation spreads the window's cells apart: it sees farther with the same number of weights.",
      "Change the numbers and watch the output. Point at a place of the output, or walk there with the arrow keys, to see which input pixels it reads. Point at an input pixel to see which places of the output read it.",
    ],
  },
  {
    id: "relu",
    title: "ReLU: keep what is positive",
    text: [
      "After a convolution comes a simple function that is applied to each value alone. The best known is ReLU: positive values stay, negative values become zero. Newer networks often use softer versions such as GELU or SiLU.",
      "The step looks harmless, but without it depth would be useless. A convolution only multiplies and adds. Two convolutions in a row are again a multiplication and an addition, so a hundred of them could do no more than one. The bend in the function breaks this chain. It lets later layers ask about combinations: this edge and that colour, but not this texture.",
    ],
    layer: first(BENDS),
    live: "See this step in the network",
    caption: "A map before and after the step. The curve is the function.",
  },
  {
    id: "pooling",
    title: "Pooling: smaller maps, coarser places",
    text: [
      "Pooling makes maps smaller. Max pooling takes the largest value of each small window, often 2 × 2; average pooling takes the mean. It has no weights, so it learns nothing.",
      "Smaller maps cost less in every layer that follows. A window of the next convolution then covers more of the photo. And small shifts matter less: if the pattern moves by one pixel, the largest value of the window is often the same. The price is precision: the network knows that something is there, but less exactly where.",
      "Many networks end with a global average: each map becomes one number that says how much of its pattern the photo has.",
    ],
    layer: first(POOLS),
    live: "See the pooling in the network",
    caption: "A map before and after pooling.",
  },
  {
    id: "linear",
    title: "Fully connected layer: weigh the evidence",
    text: [
      "At the end the maps are a list of numbers. A fully connected layer, also called a linear layer, has one weight for each pair of input and output. For each label it multiplies every number by its weight and adds everything up. The sum is the label's score, its logit.",
      "A positive weight says: this feature speaks for the label. A negative weight says: it speaks against it. So the layer is a list of votes that you can read, and it is the best place to start when you ask why a label won.",
    ],
    layer: last(["Gemm", "MatMul"]),
    live: "See all votes in the network",
    caption: "What adds most to the score of the most probable label.",
  },
  {
    id: "softmax",
    title: "Softmax and sigmoid: from scores to probabilities",
    text: [
      "Logits can be any number. Softmax makes probabilities of them when exactly one label is right: it raises e to the power of each logit and divides by the sum of all powers. The results are positive and add up to 1. Only differences count. One more point of logit makes a label 2.7 times as probable compared with the others.",
      "When several labels can be right at once, each logit goes through a sigmoid, 1 / (1 + e⁻ˣ), by itself. Its result lies between 0 and 1, and the labels do not compete.",
      "A softmax always adds up to 1, even for a photo of something that the model has never seen. It says which of its labels fits best, and cannot say that none of them does. Treat a high probability as advice, and look at whether the photo is like those the model has learned from.",
    ],
    layer: last(["Softmax", "Sigmoid"]),
    live: "See the probabilities in the network",
    caption: "The labels' scores, and the probabilities that come of them.",
  },
  {
    id: "hierarchy",
    title: "Why features build on features",
    text: [
      "A value of the first convolution depends on a few pixels. A value of the second depends on a window of the first layer's values, so on a few more pixels. With each layer, and faster with each pooling, the region that one value can see grows. It is called the receptive field.",
      "A small region can hold an edge, a corner or a colour, and no more. A middle-sized one can hold a texture or a wheel; a large one can hold a whole ship. Nobody tells the layers to share the work in this way. It happens because each layer can only combine what the layer before has found, and because edges are useful for almost everything that comes later.",
      "Take care with names for features. A map in the middle of a network may answer to wheels, to dark circles, and to one kind of shadow all at once.",
    ],
    layer: (layers) => layers.findLast(({ kind, shape }) => kind === "Conv" && shape.length === 3),
    live: "See the last convolution in the network",
    caption:
      "For four layers, from early to late: the part of the input where the most active map answers most strongly, as far as it can see.",
  },
  {
    id: "training",
    title: "Training, in one paragraph",
    text: [
      "No weight is set by hand. Training starts with random weights, so the first answers are guesses. For each photo the network's probabilities are compared with the right label; a single number, the loss, says how wrong they are. Calculus gives, for every weight, the direction in which the loss would fall, and the weights move a tiny step that way. This is called gradient descent; finding the directions from the last layer back to the first is called backpropagation. After some millions of photos the kernels are what you see here. Photos that were kept aside then show how well the network does on what it has not seen.",
    ],
  },
  {
    id: "heat",
    title: "How to read a heat map, and how it can mislead",
    text: [
      "A heat map shows which parts of the photo speak for one label. If the network ends in a global average and a linear layer, the map is exact: it is the sum of the last maps, each times the label's weight (a class activation map). For all other networks the service hides random parts of the photo, many times, and notes how the label's score changes (occlusion).",
      "Read it as a question: would the answer change if this part were different? Then check, with another label, another photo, or the same photo with that part cropped away.",
    ],
    caption: "The heat maps of the two most probable labels.",
  },
];

/** How heat maps mislead: a name for each trap, and what to do about it. */
export const TRAPS = [
  [
    "It shows where, not why.",
    "Light on the water under a ship may mean that the model knows ships, or only that it knows water. Try a photo of the sea without a ship.",
  ],
  [
    "Its brightest place is always bright.",
    "Each map is stretched to its own largest value. The map of a label with 0.1 % looks as vivid as that of the winner, so read the probability first.",
  ],
  [
    "It is coarse.",
    "A class activation map has as many cells as the last maps, perhaps 7 × 7; the smooth picture is interpolated. Its edges are not the object's edges.",
  ],
  [
    "It can look right when the answer is wrong.",
    "The model may look at the animal and still name the wrong one. A sensible map is no proof of a sensible answer.",
  ],
  [
    "Hiding makes photos that do not exist.",
    "Occlusion covers parts with soft patches of the mean colour, which the model has never seen in training. Some of the change may come from the patch itself. Another random seed gives a slightly different map.",
  ],
];
