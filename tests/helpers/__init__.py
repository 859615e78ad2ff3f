"""What tests share: tiny models and rows, clusters of their own, fakes that inject faults. No tests."""
