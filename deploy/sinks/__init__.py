"""Optional copies of a run's numbers: TensorBoard, Weights & Biases. They follow its files and can neither stop nor slow it."""
