package relay

import (
	"crypto/rand"
	"testing"

	"posthouse/mesh"
	"posthouse/transport"
)

// A node that starts, or that hears of a new office a moment after the sender
// did, must not bounce that office's mail.
func TestMailOfAnOfficeThatIsNotKnownYetIsAskedForAgain(t *testing.T) {
	f := &legFrame{Envelope: transport.Envelope{Origin: transport.OriginSubmission, EntryNode: 7, From: "a@company.test"},
		Rcpts: []transport.Recipient{{Address: "b@company.test", Mailbox: mesh.MailboxID{1}}}}
	if _, err := rand.Read(f.Envelope.ID[:]); err != nil {
		t.Fatal(err)
	}
	if x := f.check(7, false, func(mesh.NodeID) bool { return true }); x != nil {
		t.Fatal(x)
	}
	if x := f.check(7, false, func(mesh.NodeID) bool { return false }); x == nil || !x.Temporary() {
		t.Errorf("an office that is not known: %v", x)
	}
	if x := f.check(8, false, func(mesh.NodeID) bool { return true }); x == nil || x.Temporary() {
		t.Errorf("a message that did not enter where it says: %v", x)
	}
}
