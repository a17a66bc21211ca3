from fastunlearn import ops
