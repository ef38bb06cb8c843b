"""The LightningModule, its optimizer and its callbacks. Imports all other rooms of lm."""
