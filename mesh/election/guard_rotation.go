//go:build !mutant_rotation

package election

// What a stop has cut off of a segment's end is put right at the next start;
// the mutant shows that a test notices when it is not.
const finishesRotations = true
