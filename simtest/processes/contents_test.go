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
	Err     error  `json:"-"` // the body could not be read
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

// folder opens a person's folder.
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
func (m *Mesh) Messages(u demo.User) ([]Message, error) { return m.messages(u, "INBOX") }

func (m *Mesh) messages(u demo.User, folder string) ([]Message, error) {
	c, box, err := m.folder(u, folder)
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
	var uids []imap.UID
	for _, x := range listed {
		uids = append(uids, x.UID)
	}
	bodies, bad := map[imap.UID]string{}, map[imap.UID]error{}
	for part := range slices.Chunk(uids, 200) {
		if readBodies(c, bodies, part...) == nil {
			continue
		}
		// One of them cannot be read, and has ended the session.
		for _, uid := range part {
			c, _, err := m.folder(u, folder)
			if err != nil {
				return nil, err
			}
			bad[uid] = readBodies(c, bodies, uid)
			c.Close()
		}
		if c, _, err = m.folder(u, folder); err != nil {
			return nil, err
		}
		defer c.Close()
	}
	var out []Message
	for _, x := range listed {
		y := Message{UID: uint32(x.UID), Subject: x.Envelope.Subject, Body: bodies[x.UID], Err: bad[x.UID]}
		for _, f := range x.Flags {
			y.Flags = append(y.Flags, string(f))
		}
		slices.Sort(y.Flags)
		out = append(out, y)
	}
	return out, nil
}

// readBodies reads the bodies of some messages of the folder that is open.
func readBodies(c *imapclient.Client, into map[imap.UID]string, uids ...imap.UID) error {
	text := &imap.FetchItemBodySection{Specifier: imap.PartSpecifierText, Peek: true}
	got, err := c.Fetch(imap.UIDSetNum(uids...), &imap.FetchOptions{UID: true, BodySection: []*imap.FetchItemBodySection{text}}).Collect()
	if err != nil {
		return err
	}
	for _, x := range got {
		b := x.FindBodySection(text)
		if b == nil && x.UID == 0 {
			return fmt.Errorf("UID %d has no body", x.UID)
		}
		into[x.UID] = string(b)
	}
	if len(got) != len(uids) {
		return fmt.Errorf("%d bodies of %d", len(got), len(uids))
	}
	return nil
}
