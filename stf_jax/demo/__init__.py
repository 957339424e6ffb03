"""The paper's claim at laptop scale: scenes, arms, training, questions, report."""
