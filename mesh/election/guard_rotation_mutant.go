//go:build mutant_rotation

package election

const finishesRotations = false
