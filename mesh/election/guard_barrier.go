//go:build !mutant_barrier

package election

// waitsForBarrier says that a new master first applies what was committed
// before its term. The tag mutant_barrier takes the guard out, and the tests
// must notice.
const waitsForBarrier = true
