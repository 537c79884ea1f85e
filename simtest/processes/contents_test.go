package processes

import (
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/emersion/go-imap/v2"
	"github.com/emersion/go-imap/v2/imapclient"

	"posthouse/appliance/demo"
)

// Message is one of a folder, read whole.
type Message struct {
	UID     uint32
	Subject string
	Flags   []string
	Body    string // everything behind the header
	Err     error  // the body could not be read
}

// check compares the body with what a message of that subject was sent with.
func (x *Message) check() error {
	if x.Err != nil {
		return x.Err
	}
	_, begin, _ := strings.Cut(Text(x.Subject, "", ""), "\r\n\r\n")
	rest, ok := strings.CutPrefix(x.Body, begin)
	if ok && rest == "" {
		return nil // of Send
	}
	rest, ends := strings.CutSuffix(rest, ending(x.Subject))
	if !ok || !ends || rest != filling(x.Subject, len(rest)/66) {
		return fmt.Errorf("%w: it has %d bytes and begins with %.40q", errBody, len(x.Body), x.Body)
	}
	return nil
}

// folder opens INBOX of a person for reading.
func (m *Mesh) folder(u demo.User, name string) (*imapclient.Client, *imap.SelectData, error) {
	n := m.Node(u.Home)
	c, err := imapclient.DialTLS(net.JoinHostPort(n.Address, strconv.Itoa(n.Ports.IMAPS)), &imapclient.Options{TLSConfig: m.TLS(n.Address)})
	if err != nil {
		return nil, nil, err
	}
	if err = c.Login(u.Address, u.Password).Wait(); err == nil {
		var box *imap.SelectData
		if box, err = c.Select(name, nil).Wait(); err == nil {
			return c, box, nil
		}
	}
	c.Close()
	return nil, nil, err
}

// Messages reads INBOX whole, message by message: one that cannot be read has
// an Err.
func (m *Mesh) Messages(u demo.User) ([]Message, error) {
	c, box, err := m.folder(u, "INBOX")
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if box.NumMessages == 0 {
		return nil, nil
	}
	var all imap.SeqSet
	all.AddRange(1, 0)
	listed, err := c.Fetch(all, &imap.FetchOptions{UID: true, Flags: true, Envelope: true}).Collect()
	if err != nil {
		return nil, err
	}
	text := &imap.FetchItemBodySection{Specifier: imap.PartSpecifierText, Peek: true}
	var out []Message
	for part := range slices.Chunk(listed, 200) {
		var uids imap.UIDSet
		for _, x := range part {
			uids.AddNum(x.UID)
		}
		bodies := map[imap.UID]string{}
		got, err := c.Fetch(uids, &imap.FetchOptions{UID: true, BodySection: []*imap.FetchItemBodySection{text}}).Collect()
		for _, x := range got {
			bodies[x.UID] = string(x.FindBodySection(text))
		}
		for _, x := range part {
			y := Message{UID: uint32(x.UID), Subject: x.Envelope.Subject}
			for _, f := range x.Flags {
				y.Flags = append(y.Flags, string(f))
			}
			slices.Sort(y.Flags)
			if b, ok := bodies[x.UID]; ok {
				y.Body = b
			} else {
				y.Err = fmt.Errorf("it cannot be read: %w", err)
			}
			out = append(out, y)
		}
	}
	return out, nil
}
