//go:build !mutant_entry

package relay

// entriesAreMembers says that mail which entered at a node outside of the mesh is not taken, even while a connection to it still stands. The tag
// mutant_entry takes the guard out, and the tests must notice.
const entriesAreMembers = true
