"""The LightningModule, its optimizer and its callbacks. Imports the rest of lm."""
