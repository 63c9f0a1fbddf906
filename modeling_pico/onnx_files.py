"""Names of the files of an ONNX export, for what writes them and for what reads them without PyTorch."""

IMAGE_ENCODER, TEXT_ENCODER = "image_encoder.onnx", "text_encoder.onnx"
# Of which model the encoders are (`identity`), and with what its images are prepared (`image_backend`).
ABOUT_FILE = "encoders.json"
