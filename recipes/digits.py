"""scikit-learn's handwritten digits: 1,437 training images of 8×8 pixels. Nothing to download."""

from dpml.config import DPSGDRun


def dpsgd(private: bool = True) -> DPSGDRun:
    """A small tanh CNN on digits in a few seconds."""
    if not private:
        return DPSGDRun(dataset="digits", non_private=True, epochs=30, batch_size=64, learning_rate=0.1)
    return DPSGDRun(
        dataset="digits",
        epsilon=3.0,
        delta=1e-4,
        model="linear",
        epochs=40,
        batch_size=256,
        clip_norm=1.0,
        learning_rate=0.5,
        momentum=0.9,
    )
