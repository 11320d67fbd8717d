"""DICOM-native PACS node."""
