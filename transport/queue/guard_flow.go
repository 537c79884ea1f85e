//go:build !mutant_flow

package queue

// flowTogether says that mail which stood behind earlier mail goes together once that has gone through. The tag mutant_flow takes the
// guard out, and the tests must notice.
const flowTogether = true
