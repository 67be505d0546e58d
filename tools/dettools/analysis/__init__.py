"""From predictions to understanding: errors, confusions, occlusion, anchors."""
