//go:build !mutant_overtake

package log

// heedsOrder: what must not overtake a refused record is refused. A build tag takes
// it away, for the test that must notice.
const heedsOrder = true
