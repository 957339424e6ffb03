"""The paper's claim at laptop scale: scenes, variants, training, questions, report."""
