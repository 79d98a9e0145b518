# Install what the locked file $1 lists into /packages, and leave out what a service has no use for.
set -eu
pip install --disable-pip-version-check --only-binary :all: --require-hashes --no-deps --target /packages -r "$1"
cd /packages
rm -rf bin
# Of ONNX Runtime's Python, all but its core is for converting models, with torch and onnx.
rm -r onnxruntime/quantization onnxruntime/tools onnxruntime/transformers
find . -type d -name tests -prune -exec rm -r {} +
# What only compilers and type checkers read.
rm -r numpy/f2py
find . \( -name '*.pyi' -o -name '*.h' -o -name '*.a' \) -delete
# What only colours help texts and code in a terminal (TYPER_USE_RICH=0).
rm -r pygments* markdown_it* mdurl*
