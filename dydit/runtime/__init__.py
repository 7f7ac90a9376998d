"""Running a bundle: backends, the sampling loop, bulk runs and the pipeline. Needs no PyTorch on onnxruntime."""
