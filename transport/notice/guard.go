//go:build !mutant_any_word

package notice

// ownWordOnly: a node is heard about its own mailboxes alone. A build tag takes
// it away, for the test that must notice.
const ownWordOnly = true
